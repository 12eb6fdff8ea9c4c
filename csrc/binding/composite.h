// The definition, written with at:: operations only. It serves wherever the fused kernels do not
// reach (complex numbers, other devices, some vmap levels, derivatives of derivatives, Inductor's
// fusible mode), and it is what the tests compare with.
//
// No formula takes the saved rstd: it carries no derivative, so an outer gradient through it would
// be silently wrong. r is always recomputed from x. Weight and bias broadcast to x from the right,
// and their gradients are sums over what was broadcast.
//
// x may stand for rows of a narrower type: a product with a gate, in the arithmetic type. `type` is
// then the type that results follow and that llama mode rounds to, else x's own.
#pragma once
#include <ATen/TensorOperators.h>

#include <array>
#include <tuple>

#include "options.h"

namespace fused_rmsnorm {

using at::Tensor;
using OptTensor = std::optional<Tensor>;
using OptType = std::optional<at::ScalarType>;
using Mask3 = std::array<bool, 3>;
using Two = std::tuple<Tensor, Tensor>;
using Three = std::tuple<Tensor, Tensor, Tensor>;

// (y before its last rounding, rstd)
Two composite_unrounded(const Options& options, const Tensor& x, const OptTensor& weight,
                        const OptTensor& bias, OptType type = {});
// (y, rstd)
Two composite_fwd(const Options& options, const Tensor& x, const OptTensor& weight, const OptTensor& bias);

// (dx, dw, db), undefined where the mask says so; grad_sum (may be absent) is added to dx.
Three composite_bwd(const Options& options, const Tensor& dy, const Tensor& x, const OptTensor& weight,
                    const OptTensor& grad_sum, Mask3 mask, OptType type = {});

// Derivatives of composite_bwd: cotangents of (dx, dw, db), each possibly undefined, to gradients
// of (dy, x, weight). The gradient of grad_sum is the cotangent of dx itself.
Three composite_bwd_bwd(const Options& options, const Tensor& ddx, const Tensor& ddw, const Tensor& ddb,
                        const Tensor& dy, const Tensor& x, const OptTensor& weight, OptType type = {});

// Tangent of y for tangents of x, weight and bias, each possibly undefined but not all of them.
Tensor composite_tangent(const Options& options, const Tensor& x, const OptTensor& weight,
                         const Tensor& x_tangent, const Tensor& weight_tangent, const Tensor& bias_tangent);

}  // namespace fused_rmsnorm
