// The operators of a backend that has fused kernels. A backend supplies
//   struct Guard { explicit Guard(const Tensor&); }   what must hold while it allocates and launches
//   static int64_t workspace(const Backward&);        bytes
//   static void run(const Forward&);
//   static void run(const Backward&);
// and calls register_backend<Backend>(m).
#pragma once
#include <ATen/ops/empty.h>

#include "checks.h"
#include "kernel_args.h"
#include "ops.h"
#include "registration.h"

namespace fused_rmsnorm {

template <class Backend>
Two fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  if (!is_fused(options, x, weight)) return composite_fwd(options, x.contiguous(), weight, bias);
  const typename Backend::Guard guard(x);
  const ForwardCall call(options, x, {}, weight, bias);
  Backend::run(call.args);
  return {call.y, call.rstd};
}

template <class Backend>
Three add_fwd(const Options& options, const Tensor& x, const Tensor& residual, const OptTensor& weight,
              const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  check_residual(x, residual);
  if (!is_fused(options, x, weight) || residual.scalar_type() != x.scalar_type()) {
    return add_by_parts(options, x, residual, weight, bias);
  }
  const typename Backend::Guard guard(x);
  const ForwardCall call(options, x, residual, weight, bias);
  Backend::run(call.args);
  return {call.y, call.sum, call.rstd};
}

template <class Backend>
void add_inplace(const Options& options, Tensor& x, Tensor& residual, const OptTensor& weight,
                 const OptTensor& bias) {
  check_fwd(options, x, weight, bias);
  check_add_inplace(options, x, residual, weight);
  check_no_overlap(x, residual, weight, bias);
  if (is_fused(options, x, weight) && residual.scalar_type() == x.scalar_type() && x.is_contiguous() &&
      residual.is_contiguous()) {
    const typename Backend::Guard guard(x);
    return Backend::run(ForwardCall::inplace(options, x, residual, weight, bias).args);
  }
  const auto [y, sum, rstd] = call_add_fwd(options, x, residual, weight, bias);
  x.copy_(y);
  residual.copy_(sum);
}

template <class Backend>
void run_backward(BackwardCall& call) {
  if (call.args.rows == 0) {  // sums of nothing
    if (call.dw.defined()) call.dw.zero_();
    if (call.db.defined()) call.db.zero_();
    return;
  }
  if (const int64_t bytes = Backend::workspace(call.args)) {
    call.workspace = at::empty({bytes}, call.x.options().dtype(at::kByte));
    call.args.workspace = call.workspace.mutable_data_ptr();
  }
  Backend::run(call.args);
}

template <class Backend>
Three bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
          const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask) {
  check_bwd(options, dy, x, weight, rstd, grad_sum);
  if (!is_fused(options, x, weight)) {
    return composite_bwd(options, dy.contiguous(), x.contiguous(), weight, grad_sum, mask);
  }
  const typename Backend::Guard guard(x);
  BackwardCall call(options, dy, x, weight, rstd, grad_sum, mask);
  run_backward<Backend>(call);
  return call.results(weight);
}

template <class Backend>
Two gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
              const OptTensor& bias) {
  check_gated_fwd(options, x, gate, weight, bias);
  if (!is_fused(options, x, gate, weight)) {
    return composite_gated_fwd(options, x.contiguous(), gate.contiguous(), weight, bias);
  }
  const typename Backend::Guard guard(x);
  const ForwardCall call(options, x, gate, weight, bias);
  Backend::run(call.args);
  return {call.y, call.rstd};
}

template <class Backend>
Four gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
               const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask) {
  check_gated_bwd(options, dy, x, gate, weight, bias, rstd);
  if (!is_fused(options, x, gate, weight)) {
    return composite_gated_bwd(options, dy.contiguous(), x.contiguous(), gate.contiguous(), weight, bias,
                               mask);
  }
  const typename Backend::Guard guard(x);
  BackwardCall call(options, dy, x, gate, weight, bias, rstd, mask);
  run_backward<Backend>(call);
  return call.results(gate, weight, mask);
}

template <class Backend>
void register_backend(torch::Library& m) {
  m.impl("rms_norm_fwd", kernel<fwd<Backend>>);
  m.impl("add_rms_norm_fwd", kernel<add_fwd<Backend>>);
  m.impl("add_rms_norm_", kernel<add_inplace<Backend>>);
  m.impl("rms_norm_bwd", kernel<bwd<Backend>>);
  m.impl("rms_norm_gated_fwd", kernel<gated_fwd<Backend>>);
  m.impl("rms_norm_gated_bwd", kernel<gated_bwd<Backend>>);
}

}  // namespace fused_rmsnorm
