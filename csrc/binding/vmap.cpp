// vmap. A batch of rows under one weight is just more rows: it stays on the fused kernel. A batch
// of weights, or gradients of a weight per sample, take the composite, which batches by itself.
#include <ATen/functorch/BatchedTensorImpl.h>

#include <algorithm>

#include "ops.h"
#include "registration.h"

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
  // The same for a tensor that may not be batched, and is then repeated without a copy.
  Tensor rows(const Tensor& t, const c10::SymInt& size) const {
    if (batches(t)) return unwrap(t);
    c10::SymDimVector sizes(t.sym_sizes());
    sizes.insert(sizes.begin(), size);
    return t.expand_symint(sizes);
  }
  // Of the batch, of which one of the tensors is a part.
  c10::SymInt size(std::initializer_list<OptTensor> tensors) const {
    for (const auto& t : tensors) {
      if (batches(t)) return unwrap(*t).sym_size(0);
    }
    TORCH_INTERNAL_ASSERT(false, "nothing is batched at level ", level);
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

// dx of a batch of rows is dx of more rows, whether the batch is one of x, of grad_output (many
// gradients of one forward) or of both: what is not batched is read again for each, by stride 0.
// dw and db of each sample take the composite: the kernel would add the samples up.
Three bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
          const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask) {
  const Level vmap = Level::of(dy, x, weight, rstd, grad_sum);
  if (vmap.batches(weight)) return composite_bwd(options, dy, x, weight, grad_sum, mask);
  Tensor dx, dw, db;
  if (mask[1] || mask[2]) {
    std::tie(dx, dw, db) = composite_bwd(options, dy, x, weight, {}, {false, mask[1], mask[2]});
  }
  if (mask[0]) {
    const OutsideVmap guard(kBatched);
    const c10::SymInt size = vmap.size({dy, x, rstd, grad_sum});
    const OptTensor sum = present(grad_sum) ? OptTensor(vmap.rows(*grad_sum, size)) : std::nullopt;
    dx = vmap.wrap(std::get<0>(call_bwd(options, vmap.rows(dy, size), vmap.rows(x, size), weight,
                                        vmap.rows(rstd, size), sum, {true, false, false})));
  }
  return {dx, dw, db};
}

// The same of a gated norm: a batch of input and gate is more rows of both.
Two gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
              const OptTensor& bias) {
  const Level vmap = Level::of(x, gate, weight, bias);
  if (vmap.batches(weight) || vmap.batches(bias)) return composite_gated_fwd(options, x, gate, weight, bias);
  const OutsideVmap guard(kBatched);
  const c10::SymInt size = vmap.size({x, gate});
  const auto [y, rstd] = call_gated_fwd(options, vmap.rows(x, size), vmap.rows(gate, size), weight, bias);
  return {vmap.wrap(y), vmap.wrap(rstd)};
}

Four gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
               const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask) {
  const Level vmap = Level::of(dy, x, gate, weight, bias, rstd);
  if (vmap.batches(weight) || vmap.batches(bias)) {
    return composite_gated_bwd(options, dy, x, gate, weight, bias, mask);
  }
  Tensor dx, dgate, dw, db;
  if (mask[2] || mask[3]) {
    std::tie(dx, dgate, dw, db) =
        composite_gated_bwd(options, dy, x, gate, weight, bias, {false, false, mask[2], mask[3]});
  }
  if (mask[0] || mask[1]) {
    const OutsideVmap guard(kBatched);
    const c10::SymInt size = vmap.size({dy, x, gate, rstd});
    const auto grads = call_gated_bwd(options, vmap.rows(dy, size), vmap.rows(x, size), vmap.rows(gate, size),
                                      weight, bias, vmap.rows(rstd, size), {mask[0], mask[1], false, false});
    if (mask[0]) dx = vmap.wrap(std::get<0>(grads));
    if (mask[1]) dgate = vmap.wrap(std::get<1>(grads));
  }
  return {dx, dgate, dw, db};
}

// Weight or bias of the batch of x, which has `dims` dimensions: in front the batch, then what broadcasts
// over the rows of a sample.
OptTensor of_batch(const Level& vmap, const OptTensor& t, const c10::SymInt& size, int64_t dims) {
  if (!present(t)) return t;
  Tensor rows = vmap.rows(*t, size);
  while (rows.dim() < dims) rows = rows.unsqueeze(1);
  return rows;
}

// Written in place is the batch itself, by the operator that refuses what must not be written.
void add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                 const OptTensor& bias) {
  const Level vmap = Level::of(x, residual, weight, bias);
  for (const auto& [t, name] : {std::pair(&x, "input"), std::pair(&residual, "residual")}) {
    TORCH_CHECK(vmap.batches(*t), name,
                " must be batched by vmap to be written in place, because another argument is: expand and "
                "clone it, or call add_rms_norm");
  }
  const OutsideVmap guard(kBatched);
  Tensor rows = vmap.unwrap(x), residual_rows = vmap.unwrap(residual);
  OptTensor w = weight, b = bias;
  if (vmap.batches(weight) || vmap.batches(bias)) {
    w = of_batch(vmap, weight, rows.sym_size(0), rows.dim());
    b = of_batch(vmap, bias, rows.sym_size(0), rows.dim());
  }
  call_add_inplace(options, rows, residual_rows, w, b);
}

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(FuncTorchBatched, m) {
  m.impl("rms_norm_fwd", kernel<fwd>);
  m.impl("add_rms_norm_fwd", kernel<add_by_parts>);
  m.impl("add_rms_norm_", kernel<add_inplace>);
  m.impl("rms_norm_bwd", kernel<bwd>);
  m.impl("rms_norm_gated_fwd", kernel<gated_fwd>);
  m.impl("rms_norm_gated_bwd", kernel<gated_bwd>);
}

}  // namespace fused_rmsnorm
