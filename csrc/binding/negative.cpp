// add_rms_norm_ of tensors that hold the negative of what they are (the imaginary part of a conjugate,
// torch._neg_view). torch's fallback for them hands the result of an operator back to its argument, takes
// that result from the stack, and corrupts the heap where an operator that writes returns nothing. The
// other operators here return new tensors, for which it is right.
#include "checks.h"
#include "ops.h"
#include "registration.h"

namespace fused_rmsnorm {
namespace {

OptTensor resolved(const OptTensor& t) { return present(t) ? OptTensor(t->resolve_neg()) : std::nullopt; }

void add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                 const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  check_add_inplace(options, x, residual, weight);
  check_no_overlap(x, residual, weight, bias);  // of copies there would be none
  Tensor y = x.resolve_neg(), sum = residual.resolve_neg();
  call_add_inplace(options, y, sum, resolved(weight), resolved(bias));
  if (x.is_neg()) x.copy_(y);
  if (residual.is_neg()) residual.copy_(sum);
}

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(Negative, m) { m.impl("add_rms_norm_", kernel<add_inplace>); }

}  // namespace fused_rmsnorm
