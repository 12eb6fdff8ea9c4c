// Weight and bias of the columns that a thread works on.
#pragma once
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

// Unaligned rows have aligned weights as a rule: an unaligned one is not worth registers for shifting.
template <class W, Access kAccess, int V>
__device__ __forceinline__ Vec<W, V> load_affine(const void* vector, int64_t n, int c) {
  RowReader<W, V, kAccess> reader(vector, n);
  reader.alone = true;
  return reader.load(c);
}

// scale = weight_offset + w, or 1 without a weight.
template <class W, Access kAccess, class T, int V>
__device__ __forceinline__ void load_scale(const void* weight, double offset, int64_t n, int c,
                                           T (&scale)[V]) {
  if (!weight) {
#pragma unroll
    for (int j = 0; j < V; ++j) scale[j] = 1;
    return;
  }
  const auto w = load_affine<W, kAccess, V>(weight, n, c);
#pragma unroll
  for (int j = 0; j < V; ++j) scale[j] = static_cast<T>(widen(w.v[j])) + static_cast<T>(offset);
}

}  // namespace fused_rmsnorm::cuda
