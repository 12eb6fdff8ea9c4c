// Shapes and dtypes without data: for torch.compile, export and meta tensors.
#include "checks.h"
#include "ops.h"
#include "registration.h"

namespace fused_rmsnorm {
namespace {

Tensor empty_as(const Tensor& x, at::ScalarType type) {
  return at::empty_symint(x.sym_sizes(), x.options().dtype(type));
}

Two fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  c10::SymDimVector stat_sizes(x.sym_sizes());
  stat_sizes.back() = 1;
  return {empty_as(x, output_type(options, x.scalar_type(), weight)),
          at::empty_symint(stat_sizes, x.options().dtype(acc_type(x.scalar_type())))};
}

Three add_fwd(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
              const OptTensor& bias) {
  check_residual(x, residual);
  const auto [y, rstd] = fwd(options, x, weight, bias);
  return {y, empty_as(x, x.scalar_type()), rstd};
}

void add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                 const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  check_add_inplace(options, x, residual, weight);
}

Three bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
          const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask) {
  check_bwd(options, dy, x, weight, rstd, grad_sum);
  const auto as_weight = [&](bool wanted) {
    return wanted && present(weight) ? empty_as(*weight, weight->scalar_type()) : Tensor();
  };
  return {mask[0] ? empty_as(x, x.scalar_type()) : Tensor(), as_weight(mask[1]), as_weight(mask[2])};
}

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(Meta, m) {
  m.impl("rms_norm_fwd", kernel<fwd>);
  m.impl("add_rms_norm_fwd", kernel<add_fwd>);
  m.impl("add_rms_norm_", kernel<add_inplace>);
  m.impl("rms_norm_bwd", kernel<bwd>);
}

}  // namespace fused_rmsnorm
