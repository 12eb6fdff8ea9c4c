#include "kernel_args.h"

#include <ATen/ops/empty.h>
#include <ATen/ops/empty_like.h>

namespace fused_rmsnorm {
namespace {

Dtype dtype_of(at::ScalarType t) {
  switch (t) {
    case at::kFloat:
      return Dtype::f32;
    case at::kHalf:
      return Dtype::f16;
    case at::kBFloat16:
      return Dtype::bf16;
    case at::kDouble:
      return Dtype::f64;
    default:
      TORCH_INTERNAL_ASSERT(false, "no kernel for ", t);
  }
}

// The leading dimensions, folded into at most two levels of strides; nullopt if it takes more, if the
// elements of a row are not adjacent, or if the rows are more than norm.h allows.
std::optional<Rows> fold_rows(const Tensor& t) {
  Rows rows;
  rows.data = t.const_data_ptr();
  if (t.is_contiguous()) {
    rows.outer_stride = t.size(-1);
    return rows;
  }
  if (t.size(-1) != 1 && t.stride(-1) != 1) return std::nullopt;
  struct Level {
    int64_t size, stride;
  };
  c10::SmallVector<Level, 4> levels;  // outermost first
  for (int64_t d = 0; d < t.dim() - 1; d++) {
    const Level next{t.size(d), t.stride(d)};
    if (next.size == 1) continue;
    if (!levels.empty() && levels.back().stride == next.size * next.stride) {
      levels.back() = {levels.back().size * next.size, next.stride};
    } else {
      levels.push_back(next);
    }
  }
  if (levels.size() > 2) return std::nullopt;
  if (levels.size() == 2) {
    if (t.is_cuda() && levels[0].size > (int64_t{1} << 31) / levels[1].size) return std::nullopt;
    rows.inner = levels[1].size;
    rows.outer_stride = levels[0].stride;
    rows.inner_stride = levels[1].stride;
  } else if (levels.size() == 1) {
    rows.outer_stride = levels[0].stride;
  }
  return rows;
}

// `owner` becomes the tensor that the rows point into: t itself, or a contiguous copy.
Rows rows_of(const Tensor& t, Tensor& owner) {
  owner = t;
  if (auto rows = fold_rows(t)) return *rows;
  owner = t.contiguous();
  return *fold_rows(owner);
}

// The kernels read a weight in x's dtype or in the arithmetic type; anything else is widened,
// which is exact (or, from fp64 under a narrower x, what the definition does too).
at::ScalarType weight_type(const Tensor& x, const OptTensor& weight) {
  if (!present(weight) || weight->scalar_type() == x.scalar_type()) return x.scalar_type();
  return acc_type(x.scalar_type());
}

Tensor as_vector(const OptTensor& t, at::ScalarType type) {
  return present(t) ? t->to(type).contiguous() : Tensor();
}

const void* data(const Tensor& t) { return t.defined() ? t.const_data_ptr() : nullptr; }
void* mutable_data(const Tensor& t) { return t.defined() ? t.mutable_data_ptr() : nullptr; }

Tensor empty_rstd(const Tensor& x) {
  at::DimVector sizes(x.sizes());
  sizes.back() = 1;
  return at::empty(sizes, x.options().dtype(acc_type(x.scalar_type())));
}

// How the rows of x take those of a weight that broadcasts to it: row i takes row (i / share) % rows. So
// it is where the dimensions that the weight has are neighbours; nullopt where they are not.
struct WeightRows {
  int64_t rows = 1, share = 1;
};
std::optional<WeightRows> weight_rows(const Tensor& x, const OptTensor& weight) {
  WeightRows result;
  if (!present(weight)) return result;
  bool shared_beyond = false;
  for (int64_t d = 2; d <= x.dim(); d++) {
    const int64_t size = x.size(-d);
    if (size == 1) continue;
    if (d > weight->dim() || weight->size(-d) == 1) {
      if (result.rows == 1) {
        result.share *= size;
      } else {
        shared_beyond = true;
      }
    } else if (shared_beyond) {
      return std::nullopt;
    } else {
      result.rows *= size;
    }
  }
  if (result.rows == 1) result.share = 1;
  return result;
}

template <class Call>
void set_weight_rows(Call& args, const Tensor& x, const OptTensor& weight) {
  const WeightRows found = *weight_rows(x, weight);
  args.weight_rows = found.rows;
  args.weight_share = found.share;
  args.weight_has_rows = present(weight) && weight->dim() > 1;
}

template <class Call>
void set_gate(Call& args, const GatedOptions& options, Tensor& gate) {
  args.gate = options.norm_before_gate ? Gate::last : Gate::first;
  args.sigmoid = options.sigmoid;
  args.z = rows_of(gate, gate);
}

}  // namespace

bool is_fused(const Options& options, const Tensor& x, const OptTensor& weight) {
  const auto t = x.scalar_type();
  if (t != at::kFloat && t != at::kHalf && t != at::kBFloat16 && t != at::kDouble) return false;
  if (x.size(-1) == 0) return false;
  if (present(weight) && weight->numel() != x.size(-1)) {  // more than one row of it, or none
    if (x.numel() == 0 || !weight_rows(x, weight)) return false;
  }
  const auto y = output_type(options, t, weight);
  return y == t || y == at::kFloat;
}

bool is_fused(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight) {
  const auto t = x.scalar_type();
  return t != at::kDouble && c10::promoteTypes(t, gate.scalar_type()) == t &&
         is_fused(static_cast<const Options&>(options), x, weight);
}

void ForwardCall::fill(const Options& options, const OptTensor& w, const OptTensor& b) {
  const auto w_type = weight_type(x, w);
  weight = as_vector(w, w_type);
  bias = as_vector(b, w_type);
  args.n = x.size(-1);
  args.rows = x.numel() / args.n;
  args.k = stat_columns(options.p, args.n);
  args.eps = resolve_eps(options, x.scalar_type());
  args.weight_offset = options.weight_offset;
  args.llama = options.llama;
  args.x_dtype = dtype_of(x.scalar_type());
  args.w_dtype = dtype_of(w_type);
  args.y_dtype = dtype_of(y.scalar_type());
  args.x = rows_of(x, x);
  if (residual.defined()) args.residual = rows_of(residual, residual);
  args.weight = data(weight);
  args.bias = data(bias);
  set_weight_rows(args, x, w);
  args.y = mutable_data(y);
  args.sum = mutable_data(sum);
  args.rstd = mutable_data(rstd);
}

ForwardCall::ForwardCall(const Options& options, const Tensor& x_, const OptTensor& residual_,
                         const OptTensor& w, const OptTensor& b)
    : x(x_), residual(residual_.value_or(Tensor())) {
  y = at::empty(x.sizes(), x.options().dtype(output_type(options, x.scalar_type(), w)));
  if (residual.defined()) sum = at::empty(x.sizes(), x.options());
  rstd = empty_rstd(x);
  fill(options, w, b);
}

ForwardCall::ForwardCall(const GatedOptions& options, const Tensor& x_, const Tensor& gate_,
                         const OptTensor& w, const OptTensor& b)
    : x(x_), gate(gate_.to(x_.scalar_type())) {
  y = at::empty(x.sizes(), x.options().dtype(output_type(options, x.scalar_type(), w)));
  rstd = empty_rstd(x);
  fill(options, w, b);
  set_gate(args, options, gate);
}

ForwardCall ForwardCall::inplace(const Options& options, const Tensor& x, const Tensor& residual,
                                 const OptTensor& w, const OptTensor& b) {
  ForwardCall call;
  call.x = call.y = x;
  call.residual = call.sum = residual;
  call.fill(options, w, b);
  return call;
}

void BackwardCall::fill(const Options& options, at::ScalarType dy_type, const Tensor& dy_, const OptTensor& w,
                        Mask3 mask) {
  const auto w_type = weight_type(x, w);
  dy = dy_.to(dy_type);
  weight = as_vector(w, w_type);
  if (mask[0]) dx = at::empty(x.sizes(), x.options());
  if (weight.defined() && mask[1]) dw = at::empty_like(weight);
  if (weight.defined() && mask[2]) db = at::empty_like(weight);
  args.n = x.size(-1);
  args.rows = x.numel() / args.n;
  args.k = stat_columns(options.p, args.n);
  args.weight_offset = options.weight_offset;
  args.llama = options.llama;
  args.x_dtype = dtype_of(x.scalar_type());
  args.w_dtype = dtype_of(w_type);
  args.dy_dtype = dtype_of(dy_type);
  args.x = rows_of(x, x);
  args.dy = rows_of(dy, dy);
  args.weight = data(weight);
  set_weight_rows(args, x, w);
  args.rstd = data(rstd);
  args.dx = mutable_data(dx);
  args.dw = mutable_data(dw);
  args.db = mutable_data(db);
}

BackwardCall::BackwardCall(const Options& options, const Tensor& dy_, const Tensor& x_, const OptTensor& w,
                           const Tensor& rstd_, const OptTensor& grad_sum_, Mask3 mask)
    : x(x_), rstd(rstd_.contiguous()) {
  fill(options, output_type(options, x.scalar_type(), w), dy_, w, mask);
  if (present(grad_sum_) && mask[0]) {
    grad_sum = grad_sum_->to(x.scalar_type());
    args.dsum = rows_of(grad_sum, grad_sum);
  }
}

// The kernel makes dx and dgate together: they share all but their last products.
BackwardCall::BackwardCall(const GatedOptions& options, const Tensor& dy_, const Tensor& x_,
                           const Tensor& gate_, const OptTensor& w, const OptTensor& b, const Tensor& rstd_,
                           Mask4 mask)
    : x(x_), gate(gate_.to(x_.scalar_type())), rstd(rstd_.contiguous()) {
  const bool both = mask[0] || mask[1];
  fill(options, output_type(options, x.scalar_type(), w), dy_, w, {both, mask[2], mask[3]});
  set_gate(args, options, gate);
  if (!both) return;
  bias = as_vector(b, weight_type(x, w));
  args.bias = data(bias);
  dgate = at::empty(x.sizes(), x.options());
  args.dz = mutable_data(dgate);
}

Three BackwardCall::results(const OptTensor& w) const {
  const auto in_type = [&](const Tensor& t) { return t.defined() ? t.to(w->scalar_type()) : t; };
  return {dx, in_type(dw), in_type(db)};
}

Four BackwardCall::results(const Tensor& z, const OptTensor& w, Mask4 mask) const {
  const Three others = results(w);
  return {mask[0] ? dx : Tensor(), mask[1] ? dgate.to(z.scalar_type()) : Tensor(), std::get<1>(others),
          std::get<2>(others)};
}

}  // namespace fused_rmsnorm
