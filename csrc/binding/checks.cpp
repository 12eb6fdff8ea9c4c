#include "checks.h"

#include <ATen/MemoryOverlap.h>

#include <algorithm>

namespace fused_rmsnorm {
namespace {

// Under torch.compile sizes that depend on data are taken to be equal, and compared when they are known.
bool same(const c10::SymInt& a, const c10::SymInt& b) {
  if (!a.is_symbolic() && !b.is_symbolic()) return a == b;
  return a.sym_eq(b).expect_true(__FILE__, __LINE__);
}

bool same(c10::SymIntArrayRef a, c10::SymIntArrayRef b) {
  return std::equal(a.begin(), a.end(), b.begin(), b.end(),
                    [](const auto& i, const auto& j) { return same(i, j); });
}

void check_vector(const Tensor& t, const char* name, const Tensor& x) {
  TORCH_CHECK(t.dim() == 1 && same(t.sym_size(0), x.sym_size(-1)), name, " must have shape [", x.sym_size(-1),
              "], the size of input's last dimension, but got ", t.sym_sizes());
  TORCH_CHECK(t.device() == x.device(), name, " must be on input's device ", x.device(), ", but is on ",
              t.device());
  TORCH_CHECK_TYPE(t.is_floating_point() || (t.is_complex() && x.is_complex()), name,
                   " must have a floating-point dtype, but got ", t.scalar_type());
}

void check_like_input(const Tensor& t, const char* name, const Tensor& x) {
  TORCH_CHECK(same(t.sym_sizes(), x.sym_sizes()), name, " must have input's shape ", x.sym_sizes(),
              ", but got ", t.sym_sizes());
  TORCH_CHECK(t.device() == x.device(), name, " must be on input's device ", x.device(), ", but is on ",
              t.device());
}

}  // namespace

void check_norm(const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  TORCH_CHECK(x.dim() > 0, "input must have at least one dimension, but got a scalar");
  TORCH_CHECK_TYPE(x.is_floating_point() || x.is_complex(),
                   "input must have a floating-point or complex dtype, but got ", x.scalar_type());
  if (present(weight)) check_vector(*weight, "weight", x);
  if (present(bias)) check_vector(*bias, "bias", x);
}

void check_residual(const Tensor& x, const Tensor& residual) {
  check_like_input(residual, "residual", x);
  TORCH_CHECK_TYPE(residual.scalar_type() == x.scalar_type(), "residual must have input's dtype ",
                   x.scalar_type(), ", but got ", residual.scalar_type());
}

void check_add_inplace(const Options& options, const Tensor& x, const Tensor& residual,
                       const OptTensor& weight) {
  check_residual(x, residual);
  const auto y_type = output_type(options, x.scalar_type(), weight);
  TORCH_CHECK_TYPE(
      y_type == x.scalar_type(), "input must have dtype ", y_type,
      " to take the result in place (the weight is wider and casting_mode is \"llama\"), but got ",
      x.scalar_type());
}

void check_no_overlap(const Tensor& x, const Tensor& residual) {
  at::assert_no_internal_overlap(x);
  at::assert_no_internal_overlap(residual);
  at::assert_no_overlap(x, residual);
}

void check_fwd(const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  check_norm(x, weight, bias);
  TORCH_CHECK_TYPE(!x.is_complex(), "input must be real here, but got ", x.scalar_type(),
                   ": call rms_norm, which takes complex numbers");
  if (!present(bias)) return;
  TORCH_CHECK(present(weight), "bias needs a weight here: call rms_norm, which takes a bias alone");
  TORCH_CHECK_TYPE(weight->scalar_type() == bias->scalar_type(), "bias must have weight's dtype ",
                   weight->scalar_type(), " here, but got ", bias->scalar_type());
}

void check_bwd(const Tensor& dy, const Tensor& x, const OptTensor& weight, const Tensor& rstd,
               const OptTensor& grad_sum) {
  check_fwd(x, weight, {});
  check_like_input(dy, "grad_output", x);
  TORCH_CHECK_TYPE(dy.is_floating_point(), "grad_output must have a floating-point dtype, but got ",
                   dy.scalar_type());
  if (present(grad_sum)) {
    check_like_input(*grad_sum, "grad_sum", x);
    TORCH_CHECK_TYPE(grad_sum->is_floating_point(), "grad_sum must have a floating-point dtype, but got ",
                     grad_sum->scalar_type());
  }
  TORCH_CHECK_TYPE(rstd.scalar_type() == acc_type(x.scalar_type()), "rstd must have dtype ",
                   acc_type(x.scalar_type()), ", but got ", rstd.scalar_type());
  TORCH_CHECK(rstd.device() == x.device() && rstd.dim() == x.dim() && rstd.sym_size(-1) == 1 &&
                  same(rstd.sym_sizes().slice(0, x.dim() - 1), x.sym_sizes().slice(0, x.dim() - 1)),
              "rstd must have input's shape with 1 for the last dimension, but got ", rstd.sym_sizes());
}

}  // namespace fused_rmsnorm
