#include "composite_gated.h"

#include <ATen/ops/sigmoid.h>
#include <ATen/ops/silu.h>

namespace fused_rmsnorm {
namespace {

// act(z) and its derivatives, in the arithmetic type.
struct Gate {
  bool is_sigmoid;
  Tensor z;

  Gate(const GatedOptions& options, const Tensor& z_, at::ScalarType acc)
      : is_sigmoid(options.sigmoid), z(z_.to(acc)) {}

  // s and 1 - s, of which neither cancels for a large z of either sign.
  Tensor s() const { return at::sigmoid(z); }
  Tensor c() const { return at::sigmoid(-z); }

  Tensor value() const { return is_sigmoid ? s() : at::silu(z); }
  Tensor first() const { return is_sigmoid ? s() * c() : s() * (1 + z * c()); }
  Tensor second() const {
    const Tensor slope = s() * c(), bend = slope * (c() - s());
    return is_sigmoid ? bend : 2 * slope + z * bend;
  }
};

// (norm(x) as the gate multiplies it, rstd)
Two before_gate(const GatedOptions& options, const Tensor& x, const OptTensor& weight,
                const OptTensor& bias) {
  const auto [t, r] = composite_unrounded(options, x, weight, bias);
  if (!options.llama) return {t, r};
  const Options& plain = options;
  return {t.to(output_type(plain, x.scalar_type(), weight)).to(t.scalar_type()), r};
}

void add(Tensor& total, const Tensor& t) {
  if (t.defined()) total = total.defined() ? total + t : t;
}

Tensor cast(const Tensor& t, const Tensor& like) { return t.defined() ? t.to(like.scalar_type()) : t; }
Tensor cast(const Tensor& t, const OptTensor& like) { return present(like) ? cast(t, *like) : Tensor(); }

}  // namespace

Two composite_gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& z,
                        const OptTensor& weight, const OptTensor& bias) {
  const at::ScalarType type = x.scalar_type(), acc = acc_type(type), out = output_type(options, type, weight);
  const Tensor a = Gate(options, z, acc).value();
  if (!options.norm_before_gate) {
    const auto [y, r] = composite_unrounded(options, x.to(acc) * a, weight, bias, type);
    return {y.to(out), r};
  }
  const auto [t, r] = before_gate(options, x, weight, bias);
  return {(t * a).to(out), r};
}

Four composite_gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& z,
                         const OptTensor& weight, const OptTensor& bias, Mask4 mask) {
  const at::ScalarType acc = acc_type(x.scalar_type());
  const Gate gate(options, z, acc);
  const Tensor g = dy.to(acc), a = gate.value();
  if (options.norm_before_gate) {
    const auto [dx, dw, db] = composite_bwd(options, g * a, x, weight, {}, {mask[0], mask[2], mask[3]});
    Tensor dz;
    if (mask[1]) dz = cast(g * std::get<0>(before_gate(options, x, weight, bias)) * gate.first(), z);
    return {dx, dz, dw, db};
  }
  const Tensor xa = x.to(acc);
  const auto [du, dw, db] =
      composite_bwd(options, g, xa * a, weight, {}, {mask[0] || mask[1], mask[2], mask[3]}, x.scalar_type());
  return {mask[0] ? cast(du * a, x) : Tensor(), mask[1] ? cast(du * xa * gate.first(), z) : Tensor(), dw, db};
}

// The chain rule over composite_gated_bwd, with a, a1, a2 = act(z), act'(z), act''(z). Before its
// gate the norm t = norm(x) has the gradient dy a, and dz = dy t a1. After it the norm is one of
// u = x a and has dx = du a, dz = du x a1.
Five composite_gated_bwd_bwd(const GatedOptions& options, const Tensor& ddx, const Tensor& ddz,
                             const Tensor& ddw, const Tensor& ddb, const Tensor& dy, const Tensor& x,
                             const Tensor& z, const OptTensor& weight, const OptTensor& bias) {
  const at::ScalarType acc = acc_type(x.scalar_type());
  const Gate gate(options, z, acc);
  const Tensor g = dy.to(acc), xa = x.to(acc), a = gate.value(), a1 = gate.first();
  const auto wide = [&](const Tensor& t) { return t.defined() ? t.to(acc) : t; };
  const Tensor qx = wide(ddx), qz = wide(ddz);
  Tensor grad_dy, grad_x, grad_z, grad_w, grad_b;
  if (options.norm_before_gate) {
    if (qx.defined() || ddw.defined() || ddb.defined()) {
      const auto [along_dn, along_x, along_w] =
          composite_bwd_bwd(options, qx, ddw, ddb, g * a, xa, weight, x.scalar_type());
      add(grad_dy, along_dn * a);
      add(grad_z, along_dn * g * a1);
      add(grad_x, along_x);
      add(grad_w, along_w);
    }
    if (qz.defined()) {
      const Tensor t = std::get<0>(before_gate(options, x, weight, bias));
      add(grad_dy, qz * t * a1);
      add(grad_z, qz * g * t * gate.second());
      const auto [along_x, along_w, along_b] =
          composite_bwd(options, qz * g * a1, xa, weight, {}, {true, true, present(bias)}, x.scalar_type());
      add(grad_x, along_x);
      add(grad_w, along_w);
      add(grad_b, along_b);
    }
  } else {
    const Tensor u = xa * a;
    Tensor q;
    if (qx.defined()) add(q, qx * a);
    if (qz.defined()) add(q, qz * xa * a1);
    if (q.defined() || ddw.defined() || ddb.defined()) {
      const auto [along_dy, along_u, along_w] =
          composite_bwd_bwd(options, q, ddw, ddb, g, u, weight, x.scalar_type());
      add(grad_dy, along_dy);
      add(grad_w, along_w);
      if (along_u.defined()) {
        add(grad_x, along_u * a);
        add(grad_z, along_u * xa * a1);
      }
    }
    if (q.defined()) {
      const Tensor du =
          std::get<0>(composite_bwd(options, g, u, weight, {}, {true, false, false}, x.scalar_type()));
      if (qx.defined()) add(grad_z, du * qx * a1);
      if (qz.defined()) {
        add(grad_x, du * qz * a1);
        add(grad_z, du * qz * xa * gate.second());
      }
    }
  }
  return {cast(grad_dy, dy), cast(grad_x, x), cast(grad_z, z), cast(grad_w, weight), cast(grad_b, bias)};
}

}  // namespace fused_rmsnorm
