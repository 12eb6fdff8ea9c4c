// The kernels for NEON.
// Compile flags: -O3 -ffp-contract=off
// clang-format off: the order matters
#include "kernels.h"
#include "simd_neon.h"  // before the bodies, which are written in its terms
#include "backward.h"
#include "forward.h"
// clang-format on

namespace fused_rmsnorm::cpu {

const Kernels neon_kernels = {"NEON", forward, backward, merge};

}  // namespace fused_rmsnorm::cpu
