// From tensors to the kernels' plain structs, the same for CPU and CUDA: dtypes settled, rows
// described, outputs allocated.
#pragma once
#include "../norm.h"
#include "composite_gated.h"

namespace fused_rmsnorm {

// Whether the fused kernels cover these dtypes, a row of at least one element and this weight; if not,
// the composite does the work.
bool is_fused(const Options& options, const Tensor& x, const OptTensor& weight);
// The same beside a gate: not of fp64, and the gate has x's dtype or one that fits into it.
bool is_fused(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight);

// `args` points into the tensors beside it.
struct ForwardCall {
  Forward args;
  Tensor y, sum, rstd;
  Tensor x, residual, gate, weight, bias;  // as the kernel reads them: converted or copied only if it must

  // y and sum are new tensors.
  ForwardCall(const Options& options, const Tensor& x, const OptTensor& residual, const OptTensor& weight,
              const OptTensor& bias);
  ForwardCall(const GatedOptions& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
              const OptTensor& bias);
  // In place: y is written into x and sum into residual, both contiguous; no rstd.
  static ForwardCall inplace(const Options& options, const Tensor& x, const Tensor& residual,
                             const OptTensor& weight, const OptTensor& bias);

 private:
  ForwardCall() = default;
  void fill(const Options& options, const OptTensor& weight, const OptTensor& bias);
};

struct BackwardCall {
  Backward args;
  Tensor dx, dgate, dw, db;
  Tensor dy, x, grad_sum, gate, weight, bias, rstd, workspace;

  BackwardCall(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
               const Tensor& rstd, const OptTensor& grad_sum, Mask3 mask);
  BackwardCall(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
               const OptTensor& weight, const OptTensor& bias, const Tensor& rstd, Mask4 mask);
  // The results in the caller's dtypes: dw and db come out in the dtype that the kernel reads the weight in.
  Three results(const OptTensor& weight) const;
  // The same of a gate; dx and dgate, which come together, only where they are asked for.
  Four results(const Tensor& gate, const OptTensor& weight, Mask4 mask) const;

 private:
  void fill(const Options& options, at::ScalarType dy_type, const Tensor& dy, const OptTensor& weight,
            Mask3 mask);
};

}  // namespace fused_rmsnorm
