// dw and db from their partials: per column, `ways` threads add every ways-th partial and one adds their
// sums, all in fixed order, rounded once to the weight's dtype. Blocks of the first half of the grid
// work on dw, of the second on db, where both are wanted. Each row of the weight has partials of its own.
#pragma once
#include "plan.h"
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

constexpr int kFinalizeColumns = 32, kFinalizeMaxWays = 32;

template <class W, class T>
__global__ void __launch_bounds__(kFinalizeColumns* kFinalizeMaxWays)
    finalize(const T* partials, int count, int64_t stride, int64_t n, int64_t rows, W* first, W* second) {
  T* const sums = reinterpret_cast<T*>(shared_memory());
  const int column = threadIdx.x % kFinalizeColumns, way = threadIdx.x / kFinalizeColumns;
  const int ways = blockDim.x / kFinalizeColumns;
  const unsigned tiles = static_cast<unsigned>((n + kFinalizeColumns - 1) / kFinalizeColumns);
  const unsigned place = blockIdx.x / tiles;  // the weight's row, of dw and then of db
  const bool is_second = place >= rows;
  const int64_t c = int64_t{blockIdx.x - place * tiles} * kFinalizeColumns + column;
  partials += int64_t{place} * count * stride;
  T sum = 0;
  if (c < n) {
#pragma unroll 4
    for (int i = way; i < count; i += ways) sum += partials[i * stride + c];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (way == 0 && c < n) {
    for (int i = 1; i < ways; ++i) sum += sums[i * kFinalizeColumns + column];
    const int64_t row = place - (is_second ? rows : 0);
    (is_second ? second : first)[row * n + c] = narrow<W>(static_cast<Acc<W>>(sum));
  }
}

// partials: of each row of the weight.
template <class W, class T>
const char* launch_finalize(const Backward& b, int partials, void* stream) {
  if (!b.dw && !b.db) return nullptr;
  // Many partials belong to short rows, whose few columns would leave most of the device idle.
  const int threads = kFinalizeColumns * (partials > 64 ? kFinalizeMaxWays : 8);
  const int64_t tiles = ceil_div(b.n, kFinalizeColumns);
  const Launch launch_as{"finalize", tiles * b.weight_rows * (b.dw && b.db ? 2 : 1), threads,
                         threads * static_cast<int>(sizeof(T)), 1};
  return launch<finalize<W, T>>(launch_as, stream, static_cast<const T*>(b.workspace), partials,
                                partial_stride(b.n), b.n, b.weight_rows, static_cast<W*>(b.dw ? b.dw : b.db),
                                static_cast<W*>(b.db));
}

}  // namespace fused_rmsnorm::cuda
