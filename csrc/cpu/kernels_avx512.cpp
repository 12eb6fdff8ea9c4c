// The kernels for AVX-512.
// Compile flags: -O3 -ffp-contract=off -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
// clang-format off: the order matters
#include "kernels.h"
#include "simd_avx512.h"  // before the bodies, which are written in its terms
#include "backward.h"
#include "forward.h"
// clang-format on

namespace fused_rmsnorm::cpu {

const Kernels avx512_kernels = {"AVX512", forward, backward, merge};

}  // namespace fused_rmsnorm::cpu
