// The kernels for AVX2.
// Compile flags: -O3 -ffp-contract=off -mavx2 -mfma -mf16c
// clang-format off: the order matters
#include "kernels.h"
#include "simd_avx2.h"  // before the bodies, which are written in its terms
#include "backward.h"
#include "forward.h"
// clang-format on

namespace fused_rmsnorm::cpu {

const Kernels avx2_kernels = {"AVX2", forward, backward, merge};

}  // namespace fused_rmsnorm::cpu
