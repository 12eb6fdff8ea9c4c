// The kernels for any machine: SSE2 on x86-64, NEON on aarch64.
// Compile flags: -O3 -ffp-contract=off -fno-math-errno
// clang-format off: the order matters
#include "kernels.h"
#include "simd_baseline.h"  // before the bodies, which are written in its terms
#include "backward.h"
#include "forward.h"
// clang-format on

namespace fused_rmsnorm::cpu {

const Kernels baseline_kernels = {
#if defined(__aarch64__)
    "NEON",
#else
    "baseline",
#endif
    forward, backward, merge};

}  // namespace fused_rmsnorm::cpu
