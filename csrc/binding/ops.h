// Both directions of the dispatcher: `call_...` reaches an operator from the layer above it, and
// `kernel<f>` makes f registrable. In between, Options travel as the four plain arguments that
// close every schema: eps, p, weight_offset, casting_mode; GatedOptions put activation and
// norm_before_gate ahead of them.
#pragma once
#include <ATen/core/dispatch/Dispatcher.h>

#include "composite_gated.h"

namespace fused_rmsnorm {

// Turns f(const Options&, tensors...) into a function of (tensors..., eps, p, weight_offset, casting_mode).
template <auto f, class Function = decltype(f)>
struct WithOptions;

template <auto f, class Result, class... Args>
struct WithOptions<f, Result (*)(const Options&, Args...)> {
  static Result call(Args... args, std::optional<double> eps, std::optional<double> p, double weight_offset,
                     c10::string_view casting_mode) {
    return f(parse_options(eps, p, weight_offset, casting_mode), args...);
  }
};

template <auto f, class Result, class... Args>
struct WithOptions<f, Result (*)(const GatedOptions&, Args...)> {
  static Result call(Args... args, c10::string_view activation, bool norm_before_gate,
                     std::optional<double> eps, std::optional<double> p, double weight_offset,
                     c10::string_view casting_mode) {
    const Options options = parse_options(eps, p, weight_offset, casting_mode);
    return f(parse_gated_options(activation, norm_before_gate, options), args...);
  }
};

template <auto f>
constexpr auto kernel = &WithOptions<f>::call;

// (y, rstd)
Two call_fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias);
// (y, sum, rstd)
Three call_add_fwd(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
                   const OptTensor& bias);
void call_add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                      const OptTensor& bias);
// (dx, dw, db)
Three call_bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
               const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask);
// (y, rstd)
Two call_gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
                   const OptTensor& bias);
// (dx, dgate, dw, db)
Four call_gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
                    const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask);

// What eager mode calls beside the functions of the public header: the operators of these names,
// with checks ahead of the dispatcher, which knows nothing of arguments.
C10_EXPORT Tensor rms_norm_composite(const Tensor& x, const OptTensor& weight, const OptTensor& bias,
                                     const Options& options);
C10_EXPORT Tensor rms_norm_gated_composite(const Tensor& x, const Tensor& gate, const OptTensor& weight,
                                           const OptTensor& bias, const GatedOptions& options);
C10_EXPORT void add_rms_norm_(Tensor& x, Tensor& residual, const OptTensor& weight, const OptTensor& bias,
                              const Options& options);

// The fused add taken apart, with the same rounding: sum = x + residual, then the norm of sum, in
// the dtype that the norm of x has.
Three add_by_parts(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
                   const OptTensor& bias);

}  // namespace fused_rmsnorm
