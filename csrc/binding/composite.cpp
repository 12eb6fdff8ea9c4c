#include "composite.h"

#include <ATen/ExpandUtils.h>
#include <ATen/ops/arange.h>
#include <ATen/ops/cat.h>
#include <ATen/ops/rsqrt.h>
#include <ATen/ops/slice.h>
#include <ATen/ops/where.h>
#include <ATen/ops/zeros.h>

namespace fused_rmsnorm {
namespace {

// What the statistic of a row of n elements reads: all of them, or the first k. A length that is a
// symbol (torch.compile, export, make_fx) stays one: the first k are then those with j / n < p, by the
// definition of k, under a mask that the traced program makes for the length that it meets.
class Head {
 public:
  Head(std::optional<double> p, const Tensor& x) {
    const c10::SymInt n = x.sym_size(-1);
    if (!p || *p == 1) return;
    if (const auto known = n.maybe_as_int()) {
      const int64_t k = stat_columns(p, *known);
      if (k < *known) k_ = k;
    } else {
      mask_ = at::arange(c10::Scalar(n), x.options().dtype(at::kDouble)).div(c10::Scalar(n)).lt(*p);
      count_ = mask_.sum();
    }
  }

  // The part of t, a row for each row, that the statistic reads.
  Tensor of(const Tensor& t) const {
    if (mask_.defined()) return masked(t);
    return k_ ? t.narrow(-1, 0, *k_) : t;
  }
  // Sum over the head / k of what `of` gave.
  Tensor mean(const Tensor& head) const {
    return mask_.defined() ? head.sum({-1}, true) / count_.to(head.scalar_type()) : head.mean({-1}, true);
  }
  // Sum over the whole row / k.
  Tensor mean_of_all(const Tensor& t) const {
    return k_ ? t.sum({-1}, true) / static_cast<double>(*k_) : mean(t);
  }
  // all - [j < k] * head, of which only the head is read.
  Tensor subtract(const Tensor& all, const Tensor& head) const {
    if (mask_.defined()) return all - masked(head);
    if (!k_) return all - head;
    return at::cat({all.narrow(-1, 0, *k_) - head, at::slice(all, -1, *k_)}, -1);
  }

 private:
  Tensor masked(const Tensor& t) const { return at::where(mask_, t, at::zeros({}, t.options())); }

  std::optional<int64_t> k_;
  Tensor mask_, count_;
};

// A row, normalised: h = x * r.
struct Normalised {
  at::ScalarType acc;
  Head head;
  Tensor r, h;

  Normalised(const Options& options, const Tensor& x) : acc(acc_type(x.scalar_type())), head(options.p, x) {
    const Tensor a = x.to(acc);
    const Tensor read = head.of(a);
    r = at::rsqrt(head.mean(read * read) + resolve_eps(options, x.scalar_type()));
    h = a * r;
  }

  Tensor row_dot(const Tensor& u, const Tensor& v) const { return head.mean_of_all(u * v); }
  Tensor head_dot(const Tensor& u, const Tensor& v) const { return head.mean(head.of(u) * head.of(v)); }
  // Transposed Jacobian of h(x) applied to u: r * (u - [j < k] * h * sum(u * h) / k).
  Tensor vjp(const Tensor& u) const { return r * head.subtract(u, head.of(h) * row_dot(u, h)); }
  // Jacobian of h(x) applied to t: r * (t - h * sum(t * h over j < k) / k).
  Tensor jvp(const Tensor& t) const { return r * (t - h * head_dot(t, h)); }
};

Tensor scale_of(const Options& options, const OptTensor& weight, at::ScalarType type) {
  if (!present(weight)) return {};
  const Tensor w = weight->to(type);
  return options.weight_offset == 0 ? w : w + options.weight_offset;
}

Tensor times(const Tensor& t, const Tensor& scale) { return scale.defined() ? t * scale : t; }

// What the weight is multiplied with.
Tensor rounded(const Options& options, const Tensor& h, at::ScalarType x) {
  return options.llama ? h.to(x).to(h.scalar_type()) : h;
}

// Summed over the rows that share a row of the weight.
Tensor sum_rows(const Tensor& t, const Tensor& weight) { return at::sum_to(t, weight.sym_sizes()); }

void add(Tensor& total, const Tensor& t) { total = total.defined() ? total + t : t; }

Tensor cast(const Tensor& t, at::ScalarType type) { return t.defined() ? t.to(type) : t; }

}  // namespace

Two composite_unrounded(const Options& options, const Tensor& x, const OptTensor& weight,
                        const OptTensor& bias, OptType type) {
  const Normalised row(options, x);
  const at::ScalarType x_type = type.value_or(x.scalar_type());
  const at::ScalarType wide = c10::promoteTypes(row.acc, output_type(options, x_type, weight));
  Tensor y = times(rounded(options, row.h, x_type).to(wide), scale_of(options, weight, wide));
  if (present(bias)) y = y + bias->to(wide);
  return {y, row.r};
}

Two composite_fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  const auto [y, r] = composite_unrounded(options, x, weight, bias);
  return {y.to(output_type(options, x.scalar_type(), weight)), r};
}

Three composite_bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
                    const OptTensor& grad_sum, Mask3 mask, OptType type) {
  const Normalised row(options, x);
  const Tensor g = dy.to(row.acc);
  Tensor dx, dw, db;
  if (mask[0]) {
    dx = row.vjp(times(g, scale_of(options, weight, row.acc)));
    if (present(grad_sum)) dx = dx + grad_sum->to(row.acc);
    dx = dx.to(x.scalar_type());
  }
  if (present(weight)) {
    const Tensor h = rounded(options, row.h, type.value_or(x.scalar_type()));
    if (mask[1]) dw = sum_rows(g * h, *weight).to(weight->scalar_type());
    // A tensor of its own, also where there is nothing to sum: grad_output itself would be given the
    // history of db.
    if (mask[2]) db = at::sum_to(g, weight->sym_sizes(), true).to(weight->scalar_type());
  }
  return {dx, dw, db};
}

// With m = weight_offset + w, u = g m, c = sum(u h)/k, the backward is dx = r (u - [j<k] c h),
// dw = sum over rows of g h, db = sum over rows of g. For a cotangent q of dx, P = sum(q u)/k and
// Q = sum(q h over j<k)/k:
//   d<q, dx>/du = r (q - Q h)
//   d<q, dx>/dx = -r^2 (Q u + [j<k] (P h + c q - 3 c Q h))
Three composite_bwd_bwd(const Options& options, const Tensor& ddx, const Tensor& ddw, const Tensor& ddb,
                        const Tensor& dy, const Tensor& x, const OptTensor& weight, OptType type) {
  const Normalised row(options, x);
  const Tensor g = dy.to(row.acc), m = scale_of(options, weight, row.acc);
  const Tensor &h = row.h, &r = row.r;
  Tensor grad_dy, grad_x, grad_w;
  if (ddx.defined()) {
    const Tensor q = ddx.to(row.acc), u = times(g, m);
    const Tensor c = row.row_dot(u, h), P = row.row_dot(q, u), Q = row.head_dot(q, h);
    const Tensor du = r * (q - h * Q);
    add(grad_dy, times(du, m));
    if (m.defined()) add(grad_w, sum_rows(g * du, *weight));
    const Tensor head = row.head.of(h) * (3 * c * Q - P) - row.head.of(q) * c;
    add(grad_x, -r * r * row.head.subtract(u * Q, head));
  }
  if (ddw.defined()) {
    const Tensor q = ddw.to(row.acc);
    add(grad_dy, rounded(options, h, type.value_or(x.scalar_type())) * q);
    add(grad_x, row.vjp(g * q));
  }
  if (ddb.defined()) add(grad_dy, ddb.to(row.acc).expand_as(g));
  return {cast(grad_dy, dy.scalar_type()), cast(grad_x, x.scalar_type()),
          present(weight) ? cast(grad_w, weight->scalar_type()) : Tensor()};
}

Tensor composite_tangent(const Options& options, const Tensor& x, const OptTensor& weight,
                         const Tensor& x_tangent, const Tensor& weight_tangent, const Tensor& bias_tangent) {
  const Normalised row(options, x);
  Tensor t;
  if (x_tangent.defined()) {
    add(t, times(row.jvp(x_tangent.to(row.acc)), scale_of(options, weight, row.acc)));
  }
  if (weight_tangent.defined()) add(t, rounded(options, row.h, x.scalar_type()) * weight_tangent.to(row.acc));
  if (bias_tangent.defined()) add(t, bias_tangent.to(row.acc).expand_as(row.h));
  return t.to(output_type(options, x.scalar_type(), weight));
}

}  // namespace fused_rmsnorm
