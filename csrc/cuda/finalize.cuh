// dw and db from their partials: per column, `ways` threads add every ways-th partial and one adds their
// sums, all in fixed order, rounded once to the weight's dtype. Blocks of the first half of the grid
// work on dw, of the second on db, where both are wanted.
#pragma once
#include "plan.h"
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

constexpr int kFinalizeColumns = 32, kFinalizeMaxWays = 32;

template <class W, class T>
__global__ void __launch_bounds__(kFinalizeColumns* kFinalizeMaxWays)
    finalize(const T* partials, int count, int64_t stride, int64_t n, W* first, W* second) {
  T* const sums = reinterpret_cast<T*>(shared_memory());
  const int column = threadIdx.x % kFinalizeColumns, way = threadIdx.x / kFinalizeColumns;
  const int ways = blockDim.x / kFinalizeColumns;
  const int64_t tiles = (n + kFinalizeColumns - 1) / kFinalizeColumns;
  const bool is_second = blockIdx.x >= tiles;
  const int64_t c = (blockIdx.x - (is_second ? tiles : 0)) * kFinalizeColumns + column;
  if (is_second) partials += count * stride;
  T sum = 0;
  if (c < n) {
#pragma unroll 4
    for (int i = way; i < count; i += ways) sum += partials[i * stride + c];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (way == 0 && c < n) {
    for (int i = 1; i < ways; ++i) sum += sums[i * kFinalizeColumns + column];
    (is_second ? second : first)[c] = narrow<W>(static_cast<Acc<W>>(sum));
  }
}

template <class W, class T>
const char* launch_finalize(const Backward& b, int partials, void* stream) {
  if (!b.dw && !b.db) return nullptr;
  // Many partials belong to short rows, whose few columns would leave most of the device idle.
  const int threads = kFinalizeColumns * (partials > 64 ? kFinalizeMaxWays : 8);
  const Launch launch_as{"finalize", ceil_div(b.n, kFinalizeColumns) * (b.dw && b.db ? 2 : 1), threads,
                         threads * static_cast<int>(sizeof(T)), 1};
  return launch<finalize<W, T>>(launch_as, stream, static_cast<const T*>(b.workspace), partials,
                                partial_stride(b.n), b.n, static_cast<W*>(b.dw ? b.dw : b.db),
                                static_cast<W*>(b.db));
}

}  // namespace fused_rmsnorm::cuda
