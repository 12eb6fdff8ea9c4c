// Weight and bias of the columns that a thread works on.
#pragma once
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

// scale = weight_offset + w, or 1 without a weight.
template <class W, Access kAccess, class T, int V>
__device__ __forceinline__ void load_scale(const void* weight, double offset, int64_t n, int c,
                                           T (&scale)[V]) {
  if (!weight) {
#pragma unroll
    for (int j = 0; j < V; ++j) scale[j] = 1;
    return;
  }
  const auto w = RowReader<W, V, kAccess>(weight, n).load(c);
#pragma unroll
  for (int j = 0; j < V; ++j) scale[j] = static_cast<T>(widen(w.v[j])) + static_cast<T>(offset);
}

}  // namespace fused_rmsnorm::cuda
