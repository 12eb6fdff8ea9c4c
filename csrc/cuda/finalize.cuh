// dw and db from their partials: per column, eight threads add every eighth partial and one adds the
// eight sums, all in fixed order, rounded once to the weight's dtype.
#pragma once
#include "plan.h"
#include "vec.cuh"

namespace fused_rmsnorm::cuda {

constexpr int kFinalizeColumns = 32, kFinalizeWays = 8;

template <class W, class T>
__global__ void __launch_bounds__(kFinalizeColumns* kFinalizeWays)
    finalize(const T* partials, int count, int64_t n, W* out) {
  T* const sums = reinterpret_cast<T*>(shared_memory());
  const int column = threadIdx.x % kFinalizeColumns, way = threadIdx.x / kFinalizeColumns;
  const int64_t c = int64_t{blockIdx.x} * kFinalizeColumns + column;
  T sum = 0;
  if (c < n) {
    for (int i = way; i < count; i += kFinalizeWays) sum += partials[i * n + c];
  }
  sums[threadIdx.x] = sum;
  __syncthreads();
  if (way == 0 && c < n) {
    for (int i = 1; i < kFinalizeWays; ++i) sum += sums[i * kFinalizeColumns + column];
    out[c] = narrow<W>(static_cast<Acc<W>>(sum));
  }
}

template <class W, class T>
const char* launch_finalize(const Backward& b, int partials, void* stream) {
  const T* from = static_cast<const T*>(b.workspace);
  const Launch launch_as{"finalize", ceil_div(b.n, kFinalizeColumns), kFinalizeColumns * kFinalizeWays,
                         kFinalizeColumns * kFinalizeWays * static_cast<int>(sizeof(T)), 1};
  if (b.dw) {
    if (const char* error =
            launch(launch_as, stream, finalize<W, T>, from, partials, b.n, static_cast<W*>(b.dw))) {
      return error;
    }
    from += partials * b.n;
  }
  return b.db ? launch(launch_as, stream, finalize<W, T>, from, partials, b.n, static_cast<W*>(b.db))
              : nullptr;
}

}  // namespace fused_rmsnorm::cuda
