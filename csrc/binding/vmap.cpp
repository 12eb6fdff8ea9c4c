// vmap. A batch of rows under one weight is just more rows: it stays on the fused kernel. A batch
// of weights, or gradients of a weight per sample, take the composite, which batches by itself.
#include <ATen/functorch/BatchedTensorImpl.h>
#include <torch/library.h>

#include <algorithm>

#include "ops.h"

// Both are exported by torch, but the header that declares them needs one that wheels do not ship.
namespace at::functorch {
TORCH_API Tensor makeBatched(Tensor tensor, std::optional<int64_t> batch_dim, int64_t level);
TORCH_API std::tuple<Tensor, std::optional<int64_t>> unwrapTensorAtLevel(const Tensor& tensor, int64_t level);
}  // namespace at::functorch

namespace fused_rmsnorm {
namespace {

namespace functorch = at::functorch;

// The vmap level that a tensor is batched at; 0 (levels start at 1) if it is not.
int64_t level_of(const Tensor& t) {
  const auto* batched = t.defined() ? functorch::maybeGetBatchedImpl(t) : nullptr;
  return batched ? batched->level() : 0;
}
int64_t level_of(const OptTensor& t) { return t ? level_of(*t) : 0; }

// One level of vmap: the innermost that any argument is batched at.
struct Level {
  int64_t level;

  template <class... T>
  static Level of(const T&... t) {
    return {std::max({level_of(t)...})};
  }
  template <class T>
  bool batches(const T& t) const {
    return level_of(t) == level;
  }
  // The batch moved to the front, where it is one more dimension of rows.
  Tensor unwrap(const Tensor& t) const {
    auto [value, batch_dim] = functorch::unwrapTensorAtLevel(t, level);
    return value.movedim(*batch_dim, 0);
  }
  Tensor wrap(const Tensor& t) const { return functorch::makeBatched(t, 0, level); }
};

using OutsideVmap = c10::impl::ExcludeDispatchKeyGuard;
constexpr auto kBatched = c10::DispatchKey::FuncTorchBatched;

Two fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  const Level vmap = Level::of(x, weight, bias);
  if (!vmap.batches(x) || vmap.batches(weight) || vmap.batches(bias)) {
    return composite_fwd(options, x, weight, bias);
  }
  const OutsideVmap guard(kBatched);
  const auto [y, rstd] = call_fwd(options, vmap.unwrap(x), weight, bias);
  return {vmap.wrap(y), vmap.wrap(rstd)};
}

Three bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
          const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask) {
  const Level vmap = Level::of(dy, x, weight, rstd, grad_sum);
  const bool fused = vmap.batches(dy) && vmap.batches(x) && vmap.batches(rstd) && !vmap.batches(weight) &&
                     (!present(grad_sum) || vmap.batches(*grad_sum));
  if (!fused) return composite_bwd(options, dy, x, weight, grad_sum, mask);
  auto [dx, dw, db] = composite_bwd(options, dy, x, weight, {}, {false, mask[1], mask[2]});
  if (mask[0]) {
    const OutsideVmap guard(kBatched);
    const OptTensor sum = present(grad_sum) ? OptTensor(vmap.unwrap(*grad_sum)) : std::nullopt;
    dx = vmap.wrap(std::get<0>(call_bwd(options, vmap.unwrap(dy), vmap.unwrap(x), weight, vmap.unwrap(rstd),
                                        sum, {true, false, false})));
  }
  return {dx, dw, db};
}

void add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                 const OptTensor& bias) {
  auto [y, rstd] = call_fwd(options, residual.add_(x), weight, bias);
  x.copy_(y);
}

}  // namespace

TORCH_LIBRARY_IMPL(fused_rmsnorm, FuncTorchBatched, m) {
  m.impl("rms_norm_fwd", kernel<fwd>);
  m.impl("add_rms_norm_fwd", kernel<add_by_parts>);
  m.impl("add_rms_norm_", kernel<add_inplace>);
  m.impl("rms_norm_bwd", kernel<bwd>);
}

}  // namespace fused_rmsnorm
