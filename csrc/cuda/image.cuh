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

// Calls work(c) for this thread's share of the vectors that start at multiples of 16 bytes of `row` and
// cover columns begin ... end - 1; the first and the last may reach beyond them.
template <int kThreads, int V, class E, class Work>
__device__ __forceinline__ void by_pieces(const E* row, int begin, int end, Work work) {
#pragma unroll 1
  for (int c = begin - misaligned(row + begin) + static_cast<int>(threadIdx.x) % kThreads * V; c < end;
       c += kThreads * V) {
    work(c);
  }
}

// A run of a row in shared memory, as it is read: column c lies `bytes + c * sizeof(E)` in.
template <class E, int V>
struct RunView {
  int bytes;
  __device__ __forceinline__ Vec<E, V> load(int c) const {
    const int at = bytes + c * static_cast<int>(sizeof(E));
    const uint4* const pieces = reinterpret_cast<const uint4*>(shared_memory() + (at & ~15));
    const unsigned over = at & 15;
    return over ? load_shifted<E, V>(pieces, over) : load_pieces<E, V>(reinterpret_cast<const E*>(pieces));
  }
};

// What a block holds of a row of E, `offset` bytes into shared memory. Vectors of V elements that start
// before a run or end after it find zeros there.
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
      const int begin = columns.begin(run), end = columns.end(run);
      uint4* to = reinterpret_cast<uint4*>(shared_memory() + offset + run * kRunBytes) + thread;
#pragma unroll 1
      for (int c = begin - V - misaligned(row + begin) + thread * kPiece; c < end + V;
           c += kThreads * kPiece, to += kThreads) {
        if (c >= begin && c + kPiece <= end) {
          __pipeline_memcpy_async(to, row + c, 16);
        } else if (c + kPiece <= begin || c >= end) {
          *to = uint4{};
        } else {
          auto edge =
              gathered<E, kPiece>([&](int j) { return c + j >= begin && c + j < end ? row[c + j] : E{}; });
          *to = edge.piece(0);
        }
      }
    }
  }
  // Row m as it was fetched.
  __device__ __forceinline__ RunView<E, V> run(const Columns& columns, const Rows& rows, int64_t m,
                                               int run) const {
    const int begin = columns.begin(run);
    const int before = V + misaligned<E>(rows, m, begin) - begin;  // columns
    return {offset + run * kRunBytes + before * static_cast<int>(sizeof(E))};
  }
};

}  // namespace fused_rmsnorm::cuda
