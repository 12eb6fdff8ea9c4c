// Shapes and dtypes without data: for torch.compile, export and meta tensors.
#include <ATen/ops/empty.h>

#include "checks.h"
#include "ops.h"
#include "registration.h"

namespace fused_rmsnorm {
namespace {

Tensor empty_as(const Tensor& x, at::ScalarType type) {
  return at::empty_symint(x.sym_sizes(), x.options().dtype(type));
}

// Of rows that are normalised in `type`.
Tensor empty_rstd(const Tensor& x, at::ScalarType type) {
  c10::SymDimVector sizes(x.sym_sizes());
  sizes.back() = 1;
  return at::empty_symint(sizes, x.options().dtype(acc_type(type)));
}

Two fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  return {empty_as(x, output_type(options, x.scalar_type(), weight)), empty_rstd(x, x.scalar_type())};
}

Three add_fwd(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
              const OptTensor& bias) {
  check_residual(x, residual);
  check_fwd(options, x, weight, bias);
  return {empty_as(x, output_type(options, x.scalar_type(), weight)), empty_as(x, residual.scalar_type()),
          empty_rstd(x, residual.scalar_type())};
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

Two gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
              const OptTensor& bias) {
  check_gated_fwd(options, x, gate, weight, bias);
  return {empty_as(x, output_type(options, x.scalar_type(), weight)), empty_rstd(x, x.scalar_type())};
}

Four gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
               const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask) {
  check_gated_bwd(options, dy, x, gate, weight, bias, rstd);
  const auto as = [](const OptTensor& t, bool wanted) {
    return wanted && present(t) ? empty_as(*t, t->scalar_type()) : Tensor();
  };
  return {as(x, mask[0]), as(gate, mask[1]), as(weight, mask[2]), as(weight, mask[3])};
}

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(Meta, m) {
  m.impl("rms_norm_fwd", kernel<fwd>);
  m.impl("add_rms_norm_fwd", kernel<add_fwd>);
  m.impl("add_rms_norm_", kernel<add_inplace>);
  m.impl("rms_norm_bwd", kernel<bwd>);
  m.impl("rms_norm_gated_fwd", kernel<gated_fwd>);
  m.impl("rms_norm_gated_bwd", kernel<gated_bwd>);
}

}  // namespace fused_rmsnorm
