#include "composite.h"

namespace fused_rmsnorm {
namespace {

// A row, normalised: h = x * r. k is absent when the statistic reads the whole row, which keeps
// symbolic sizes symbolic; with p the row length has to be a number.
struct Normalised {
  at::ScalarType acc;
  std::optional<int64_t> k;
  Tensor r, h;

  Normalised(const Options& options, const Tensor& x) : acc(acc_type(x.scalar_type())) {
    if (options.p) {
      const int64_t n = x.sym_size(-1).guard_int(__FILE__, __LINE__);
      const int64_t columns = stat_columns(options.p, n);
      if (columns < n) k = columns;
    }
    const Tensor a = x.to(acc);
    const Tensor head = first(a);
    r = at::rsqrt((head * head).mean({-1}, true) + resolve_eps(options, x.scalar_type()));
    h = a * r;
  }

  Tensor first(const Tensor& t) const { return k ? t.narrow(-1, 0, *k) : t; }
  // sum over all columns / k
  Tensor row_dot(const Tensor& u, const Tensor& v) const {
    return k ? (u * v).sum({-1}, true) / static_cast<double>(*k) : (u * v).mean({-1}, true);
  }
  // sum over the first k columns / k
  Tensor head_dot(const Tensor& u, const Tensor& v) const { return (first(u) * first(v)).mean({-1}, true); }
  // all - [j < k] * head; head spans the first k columns
  Tensor minus_head(const Tensor& all, const Tensor& head) const {
    if (!k) return all - head;
    return at::cat({all.narrow(-1, 0, *k) - head, at::slice(all, -1, *k)}, -1);
  }
  // Transposed Jacobian of h(x) applied to u: r * (u - [j < k] * h * sum(u * h) / k).
  Tensor vjp(const Tensor& u) const { return r * minus_head(u, first(h) * row_dot(u, h)); }
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

Tensor sum_rows(const Tensor& t) {
  at::DimVector leading;
  for (int64_t d = 0; d < t.dim() - 1; d++) leading.push_back(d);
  return leading.empty() ? t : t.sum(leading);
}

void add(Tensor& total, const Tensor& t) { total = total.defined() ? total + t : t; }

Tensor cast(const Tensor& t, at::ScalarType type) { return t.defined() ? t.to(type) : t; }

}  // namespace

Two composite_fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  const Normalised row(options, x);
  const at::ScalarType out = output_type(options, x.scalar_type(), weight);
  const at::ScalarType type = c10::promoteTypes(row.acc, out);
  Tensor y = times(rounded(options, row.h, x.scalar_type()).to(type), scale_of(options, weight, type));
  if (present(bias)) y = y + bias->to(type);
  return {y.to(out), row.r};
}

Three composite_bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
                    const OptTensor& grad_sum, Mask3 mask) {
  const Normalised row(options, x);
  const Tensor g = dy.to(row.acc);
  Tensor dx, dw, db;
  if (mask[0]) {
    dx = row.vjp(times(g, scale_of(options, weight, row.acc)));
    if (present(grad_sum)) dx = dx + grad_sum->to(row.acc);
    dx = dx.to(x.scalar_type());
  }
  if (present(weight)) {
    const at::ScalarType type = weight->scalar_type();
    if (mask[1]) dw = sum_rows(g * rounded(options, row.h, x.scalar_type())).to(type);
    if (mask[2]) db = sum_rows(g).to(type);
  }
  return {dx, dw, db};
}

// With m = weight_offset + w, u = g m, c = sum(u h)/k, the backward is dx = r (u - [j<k] c h),
// dw = sum over rows of g h, db = sum over rows of g. For a cotangent q of dx, P = sum(q u)/k and
// Q = sum(q h over j<k)/k:
//   d<q, dx>/du = r (q - Q h)
//   d<q, dx>/dx = -r^2 (Q u + [j<k] (P h + c q - 3 c Q h))
Three composite_bwd_bwd(const Options& options, const Tensor& ddx, const Tensor& ddw, const Tensor& ddb,
                        const Tensor& dy, const Tensor& x, const OptTensor& weight) {
  const Normalised row(options, x);
  const Tensor g = dy.to(row.acc), m = scale_of(options, weight, row.acc);
  const Tensor &h = row.h, &r = row.r;
  Tensor grad_dy, grad_x, grad_w;
  if (ddx.defined()) {
    const Tensor q = ddx.to(row.acc), u = times(g, m);
    const Tensor c = row.row_dot(u, h), P = row.row_dot(q, u), Q = row.head_dot(q, h);
    const Tensor du = r * (q - h * Q);
    add(grad_dy, times(du, m));
    if (m.defined()) add(grad_w, sum_rows(g * du));
    const Tensor head = row.first(h) * (3 * c * Q - P) - row.first(q) * c;
    add(grad_x, -r * r * row.minus_head(u * Q, head));
  }
  if (ddw.defined()) {
    const Tensor q = ddw.to(row.acc);
    add(grad_dy, rounded(options, h, x.scalar_type()) * q);
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
