// The composite, on every device that has no kernels of its own.
#include "checks.h"
#include "ops.h"
#include "registration.h"

namespace fused_rmsnorm {
namespace {

Two fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  return composite_fwd(options, x.contiguous(), weight, bias);
}

Three add_fwd(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
              const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  check_residual(x, residual);
  return add_by_parts(options, x, residual, weight, bias);
}

void add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                 const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  check_add_inplace(options, x, residual, weight);
  check_no_overlap(x, residual, weight, bias);
  residual.add_(x);
  x.copy_(std::get<0>(composite_fwd(options, residual, weight, bias)));
}

Three bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
          const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask) {
  check_bwd(options, dy, x, weight, rstd, grad_sum);
  return composite_bwd(options, dy.contiguous(), x.contiguous(), weight, grad_sum, mask);
}

Two gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
              const OptTensor& bias) {
  check_gated_fwd(options, x, gate, weight, bias);
  return composite_gated_fwd(options, x.contiguous(), gate.contiguous(), weight, bias);
}

Four gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
               const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask) {
  check_gated_bwd(options, dy, x, gate, weight, bias, rstd);
  return composite_gated_bwd(options, dy.contiguous(), x.contiguous(), gate.contiguous(), weight, bias, mask);
}

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(CompositeExplicitAutograd, m) {
  m.impl("rms_norm_fwd", kernel<fwd>);
  m.impl("add_rms_norm_fwd", kernel<add_fwd>);
  m.impl("add_rms_norm_", kernel<add_inplace>);
  m.impl("rms_norm_bwd", kernel<bwd>);
  m.impl("rms_norm_gated_fwd", kernel<gated_fwd>);
  m.impl("rms_norm_gated_bwd", kernel<gated_bwd>);
}

}  // namespace fused_rmsnorm
