// Unaligned rows, on their way through shared memory.
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
    const int end = begin(run) + kColumns;
    return end < n ? end : n;
  }
  // Calls work(run, c, begin, end) for this thread's share of the vectors of each run that start at
  // multiples of 16 bytes of `row`; the first and the last of a run may reach beyond it.
  template <class E, class Work>
  __device__ __forceinline__ void by_pieces_of(const E* row, Work work) const {
#pragma unroll 1
    for (int run = 0; run < kCount; ++run) {
      const int b = begin(run), e = end(run);
#pragma unroll 1
      for (int c = b - misaligned(row + b) + threadIdx.x % kThreads * V; c < e; c += kThreads * V)
        work(run, c, b, e);
    }
  }
};

// What a block holds of a row of E, to be read in vectors of V elements that may start before a run or
// end after it: there are zeros.
template <class E, int kShape, int V, bool kCluster>
struct Image {
  using Columns = Runs<kShape, V, kCluster>;
  static constexpr int kRunBytes = image_bytes(Columns::kColumns, V, sizeof(E));
  static constexpr int kBytes = Columns::kCount * kRunBytes;
  static constexpr int kPiece = 16 / sizeof(E);  // elements
  unsigned char* bytes;

  __device__ __forceinline__ void fetch(const Columns& columns, const E* row) const {
#pragma unroll 1
    for (int run = 0; run < Columns::kCount; ++run) {
      const int begin = columns.begin(run), end = columns.end(run);
      const int thread = threadIdx.x % Columns::kThreads;
      uint4* to = reinterpret_cast<uint4*>(bytes + run * kRunBytes) + thread;
#pragma unroll 1
      for (int c = begin - V - misaligned(row + begin) + thread * kPiece; c < end + V;
           c += Columns::kThreads * kPiece, to += Columns::kThreads) {
        if (c >= begin && c + kPiece <= end) {
          __pipeline_memcpy_async(to, row + c, 16);
        } else {
          Vec<E, kPiece> edge;
#pragma unroll
          for (int j = 0; j < kPiece; ++j) edge.v[j] = c + j >= begin && c + j < end ? row[c + j] : E{};
          *to = edge.piece(0);
        }
      }
    }
  }
  // Columns c ... c + V - 1 of `row` as it was fetched.
  __device__ __forceinline__ Vec<E, V> load(const Columns& columns, const E* row, int run, int c) const {
    const int begin = columns.begin(run), at = c - begin + V + misaligned(row + begin), over = at % kPiece;
    const uint4* const pieces = reinterpret_cast<const uint4*>(bytes + run * kRunBytes) + at / kPiece;
    Vec<E, V> out;
#pragma unroll
    for (int i = 0; i < out.kPieces; ++i) out.piece(i) = pieces[i];
    if (over) {
      const uint4 last = pieces[out.kPieces];
#pragma unroll
      for (int i = 0; i < out.kPieces; ++i) {
        out.piece(i) = shifted<sizeof(E)>(out.piece(i), i + 1 < out.kPieces ? out.piece(i + 1) : last, over);
      }
    }
    return out;
  }
};

}  // namespace fused_rmsnorm::cuda
