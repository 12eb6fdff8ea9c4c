// The definition of the gated norm, written with at:: operations on top of the plain norm's:
//   norm_before_gate:   y = norm(x) * act(z)
//   else                y = norm(x * act(z))         act(z) = z * sigmoid(z), or sigmoid(z)
// The product and the gate are in the arithmetic type. In llama mode norm(x) is rounded to its own
// output type before the gate multiplies it, and of x * act(z) nothing is rounded: what the modules
// of transformers do.
#pragma once
#include "composite.h"

namespace fused_rmsnorm {

using Mask4 = std::array<bool, 4>;
using Four = std::tuple<Tensor, Tensor, Tensor, Tensor>;
using Five = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor>;

// (y, rstd)
Two composite_gated_fwd(const GatedOptions& options, const Tensor& x, const Tensor& z,
                        const OptTensor& weight, const OptTensor& bias);

// (dx, dz, dw, db), undefined where the mask says so.
Four composite_gated_bwd(const GatedOptions& options, const Tensor& dy, const Tensor& x, const Tensor& z,
                         const OptTensor& weight, const OptTensor& bias, Mask4 mask);

// Derivatives of composite_gated_bwd: cotangents of (dx, dz, dw, db), each possibly undefined, to
// gradients of (dy, x, z, weight, bias).
Five composite_gated_bwd_bwd(const GatedOptions& options, const Tensor& ddx, const Tensor& ddz,
                             const Tensor& ddw, const Tensor& ddb, const Tensor& dy, const Tensor& x,
                             const Tensor& z, const OptTensor& weight, const OptTensor& bias);

}  // namespace fused_rmsnorm
