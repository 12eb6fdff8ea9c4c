// How unaligned rows pass through shared memory.
//
// A block copies the aligned 16-byte pieces of a row into shared memory as they lie, asynchronously;
// after a barrier any thread reads any columns of it. So the sums go by the columns that the launch
// plan gives each thread, as for aligned rows, while the results go by the pieces of the output, of
// which only the two at its ends are written by elements.
#pragma once
#include "access.cuh"
#include "plan.h"

namespace fused_rmsnorm::cuda {

// The columns that a block holds side by side: all of a row; or, of a row that lies over a cluster,
// for each item those of its own threads, so that no block touches what another one reads or writes.
template <int kShape, int V, bool kCluster>
struct Runs {
  static constexpr int kThreads = kShapes[kShape].threads;
  static constexpr int kCount = kCluster ? kShapes[kShape].items : 1;
  static constexpr int kColumns = kThreads * V * (kCluster ? 1 : kShapes[kShape].items);
  int n, first, stride;

  __device__ Runs(int64_t n_, int cluster)
      : n(static_cast<int>(n_)),
        first(kCluster ? static_cast<int>(Cluster::rank()) * kColumns : 0),
        stride(kCluster ? cluster * kColumns : 0) {}
  __device__ __forceinline__ int begin(int run) const { return first + run * stride; }
  __device__ __forceinline__ int end(int run) const {
    if (!kCluster) return n;
    const int end = begin(run) + kColumns;
    return end < n ? end : n;
  }
};

// Columns begin ... end - 1 of a row, as this thread's share of them is written: vector(c) for those of V
// columns that start at multiples of 16 bytes of `row`, where there are to be any, and one(c) for each column
// before and after them. All edges take a dozen instructions so; a vector that asked for each of its elements
// whether it is inside would take fifty. The last V - 1 columns are in no vector: whoever reads the same
// columns of a weight in whole pieces of 16 bytes stays inside it.
template <int kThreads, int V, class E, class Vector, class One>
__device__ __forceinline__ void by_pieces(const E* row, int begin, int end, bool vectors, Vector vector,
                                          One one) {
  const int thread = threadIdx.x % kThreads, head = -misaligned(row + begin) & (16 / sizeof(E) - 1);
  const int rest = end - begin - head - (V - 1), whole = vectors && rest > 0 ? rest & -V : 0;
#pragma unroll 1
  for (int c = thread * V; c < whole; c += kThreads * V) vector(begin + head + c);
#pragma unroll 1
  for (int e = thread; e < end - begin - whole; e += kThreads) one(begin + e + (e < head ? 0 : whole));
}

// A row in shared memory: column c of a run lies `bytes + c * sizeof(E)` in, and `step` bytes further for
// each run before it.
template <class E, int V>
struct RowView {
  int bytes, step;

  __device__ __forceinline__ RowView run(int i) const { return {bytes + i * step, step}; }
  __device__ __forceinline__ E& column(int c) const {
    return *reinterpret_cast<E*>(shared_memory() + bytes + c * static_cast<int>(sizeof(E)));
  }
  __device__ __forceinline__ Vec<E, V> load(int c) const {
    const int at = bytes + c * static_cast<int>(sizeof(E));
    const uint4* const pieces = reinterpret_cast<const uint4*>(shared_memory() + (at & ~15));
    const unsigned over = at & 15;
    return over ? load_shifted<E, V>(pieces, over) : load_pieces<E, V>(reinterpret_cast<const E*>(pieces));
  }
};

// What a block holds of a row of E, `offset` bytes into shared memory. A vector of V columns that starts in
// the row finds zeros beyond its end.
template <class E, int kShape, int V, bool kCluster>
struct Image {
  using Columns = Runs<kShape, V, kCluster>;
  static constexpr int kRunBytes = image_bytes(Columns::kColumns, V, sizeof(E));
  static constexpr int kBytes = Columns::kCount * kRunBytes;
  int offset;

  __device__ __forceinline__ void fetch(const Columns& columns, const E* row) const {
    constexpr int kPiece = 16 / sizeof(E), kThreads = Columns::kThreads;  // elements
    const int thread = threadIdx.x % kThreads;
#pragma unroll 1
    for (int run = 0; run < Columns::kCount; ++run) {
      const int begin = columns.begin(run), count = columns.end(run) - begin;
      const E* const from = row + begin;
      const int over = misaligned(from), head = -over & (kPiece - 1);
      const int whole = count > head ? (count - head) & -kPiece : 0;
      E* const to = reinterpret_cast<E*>(shared_memory() + offset + run * kRunBytes) + over;
#pragma unroll 1
      for (int c = head + thread * kPiece; c < head + whole; c += kThreads * kPiece)
        __pipeline_memcpy_async(to + c, from + c, 16);
      // The pieces before and after these, by elements, and what the last vector reads beyond.
#pragma unroll 1
      for (int e = thread; e < 2 * kPiece + V; e += kThreads) {
        const int c = head - kPiece + e + (e < kPiece ? 0 : whole);
        if (c >= -over) to[c] = c >= 0 && c < count ? from[c] : E{};
      }
    }
  }
  // Row m as it was fetched. All of its runs begin equally far from a multiple of 16 bytes.
  __device__ __forceinline__ RowView<E, V> row(const Columns& columns, const Rows& rows, int64_t m) const {
    constexpr int kSize = sizeof(E);
    const int before = misaligned<E>(rows, m, columns.first) - columns.first;  // columns
    return {offset + before * kSize, kCluster ? kRunBytes - columns.stride * kSize : 0};
  }
};

}  // namespace fused_rmsnorm::cuda
