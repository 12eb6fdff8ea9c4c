// Argument checks, shared by every backend and by Meta. Each message names the argument, what was
// given and what is accepted: TypeError for dtypes, ValueError for values, RuntimeError for shapes
// and devices (as torch's own norms raise).
#pragma once
#include "composite.h"

namespace fused_rmsnorm {

// What every operator accepts: strided input, floating point of 16 to 64 bits or complex, with a last
// dimension; weight and bias that end in it, with no more dimensions than input before it, each 1 or
// input's, on the same device; an offset only of a weight.
void check_norm(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias);
// The residual has input's dtype or a wider one, which then is that of the sum.
void check_residual(const Tensor& x, const Tensor& residual);
// In place of check_norm: a gate is real, and so is the input.
void check_gated(const Options& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
                 const OptTensor& bias);
// In place, y takes input's place and sum residual's; the second check needs memory to look at. No
// element of either may lie in another, and what is read while they are written, weight and bias, must
// lie elsewhere.
void check_add_inplace(const Options& options, const Tensor& x, const Tensor& residual,
                       const OptTensor& weight);
void check_no_overlap(const Tensor& x, const Tensor& residual, const OptTensor& weight,
                      const OptTensor& bias);

// In addition, what the _fwd and _bwd operators accept: real numbers, weight and bias of one
// dtype and one shape, a bias only with a weight.
void check_fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias);
void check_bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
               const Tensor& rstd, const OptTensor& grad_sum);
void check_gated_fwd(const Options& options, const Tensor& x, const Tensor& gate, const OptTensor& weight,
                     const OptTensor& bias);
void check_gated_bwd(const Options& options, const Tensor& dy, const Tensor& x, const Tensor& gate,
                     const OptTensor& weight, const OptTensor& bias, const Tensor& rstd);

}  // namespace fused_rmsnorm
