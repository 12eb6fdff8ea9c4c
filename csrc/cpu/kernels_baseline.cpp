// The kernels for any machine: with vectors of 16 bytes, whatever the compiler makes of them.
// Compile flags: -O1 -fgcse -fcaller-saves -ffp-contract=off -fno-math-errno
// clang-format off: the order matters
#include "kernels.h"
#include "simd_baseline.h"  // before the bodies, which are written in its terms
#include "backward.h"
#include "forward.h"
// clang-format on

namespace fused_rmsnorm::cpu {

const Kernels baseline_kernels = {"baseline", forward, backward, merge};

}  // namespace fused_rmsnorm::cpu
