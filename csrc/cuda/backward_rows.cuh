// The backward: dx = r * (g - [j < k] * x * c) + dsum with g = dy * (offset + w) and
// c = r * (r * sum(g * x) / k), and in the same reading of x and dy
//   dw += dy * x * r,  db += dy
// These are the kernels of aligned rows; others: backward_any.cuh. Blocks stay on their
// multiprocessor and take rows in turn. While a row is reduced, the loads of the next are in flight
// (cp.async into slots of shared memory that belong to one thread each, so that no barrier is
// needed). dw and db are summed in registers; each block (or cluster) writes its sums as a partial,
// and finalize.cuh adds the partials in order.
//
// c holds r squared only: r cubed leaves fp32's range for rows near 1e-13.
#pragma once
#include "affine.cuh"
#include "plan.h"
#include "reduce.cuh"

namespace fused_rmsnorm::cuda {

// Adds to the dot product of g and x.
template <class T, int V>
__device__ __forceinline__ T dot_of(const T (&x)[V], const T (&dy)[V], const T (&scale)[V], T dot) {
#pragma unroll
  for (int j = 0; j < V; ++j) dot = multiply_add(dy[j] * scale[j], x[j], dot);
  return dot;
}

// What the columns of a row add to dw. kPlain: not in llama mode.
template <class X, bool kPlain = false, class T, int V>
__device__ __forceinline__ void add_to_dw(const Backward& b, const T (&x)[V], const T (&dy)[V], T r,
                                          T (&dw)[V]) {
  T normalised[V];
#pragma unroll
  for (int j = 0; j < V; ++j) normalised[j] = x[j] * r;
  if (!kPlain && sizeof(X) < sizeof(T) && b.llama) round_to<X>(normalised);
#pragma unroll
  for (int j = 0; j < V; ++j) dw[j] = multiply_add(dy[j], normalised[j], dw[j]);
}

// dx of columns c ... before dsum is added and it is rounded; out holds dy. kAll: k is n.
template <bool kAll = false, class T, int V>
__device__ __forceinline__ void dx_in(const Backward& b, int c, const T (&x)[V], T (&out)[V],
                                      const T (&scale)[V], T r, T coefficient) {
  const int k = static_cast<int>(b.k);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] *= scale[j];
  if (kAll || c + V <= k) {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = multiply_add(-x[j], coefficient, out[j]);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (c + j < k) out[j] = multiply_add(-x[j], coefficient, out[j]);
    }
  }
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] *= r;
}

template <class X, class T, int V>
__device__ __forceinline__ void add_to_dx(const Vec<X, V>& dsum, T (&out)[V]) {
  T more[V];
  widen(dsum, more);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] += more[j];
}

template <class T>
__device__ __forceinline__ T coefficient_of(const Backward& b, T r, T dot) {
  return r * (r * dot / static_cast<T>(static_cast<int>(b.k)));
}

// partial_stride() of plan.h, on the device.
__device__ __forceinline__ int64_t partial_step(const Backward& b) {
  return (b.n + kPartialUnit - 1) / kPartialUnit * kPartialUnit;
}

// Adds up what the rows side by side in a block have summed, in their order, and writes the block's
// partial, or adds to it. `buffer` holds one T per column and row.
template <int kThreads, int kItems, int V, class T>
__device__ __forceinline__ void put_partial(const T (&sums)[kItems][V], T* partial, bool more, T* buffer,
                                            int n, int width, int thread) {
  if constexpr (kThreads >= 128) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int c = (i * width + thread) * V;
      if (c >= n) continue;
      Vec<T, V> out{};
      if (more) out = load_pieces<T, V>(partial + c);
#pragma unroll
      for (int j = 0; j < V; ++j) out.v[j] += sums[i][j];
      store_pieces(partial + c, out);
    }
  } else {
    constexpr int kColumns = kThreads * kItems * V, kRows = 128 / kThreads;
    const int row = threadIdx.x / kThreads;
    __syncthreads();  // the buffer lies where the rows were, or the sums before these
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) buffer[row * kColumns + (i * kThreads + thread) * V + j] = sums[i][j];
    }
    __syncthreads();
    constexpr int kPiece = 16 / sizeof(T);  // a partial has room for whole pieces
    for (int c = threadIdx.x * kPiece; c < n; c += 128 * kPiece) {
      auto sum = load_pieces<T, kPiece>(buffer + c);
      for (int i = 1; i < kRows; ++i) {
        const auto next = load_pieces<T, kPiece>(buffer + i * kColumns + c);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sum.v[j] += next.v[j];
      }
      if (more) {
        const auto before = load_pieces<T, kPiece>(partial + c);
#pragma unroll
        for (int j = 0; j < kPiece; ++j) sum.v[j] = before.v[j] + sum.v[j];
      }
      store_pieces(partial + c, sum);
    }
  }
}

// The slots of one tensor: for each item and thread one vector, the same place every time.
template <class E, int V, int kItems, int kBlock>
struct Slots {
  static constexpr int kBytes = kItems * kBlock * 16;
  uint4* base;

  __device__ __forceinline__ void fetch(const E* row, int item, int c) const {
    __pipeline_memcpy_async(base + item * kBlock + threadIdx.x, row + c, 16);
  }
  __device__ __forceinline__ Vec<E, V> get(int item) const {
    Vec<E, V> v;
    v.piece(0) = base[item * kBlock + threadIdx.x];
    return v;
  }
};

template <class Types, int kShape, bool kBias, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>, kResident<kShape>)
    backward_rows(Backward b, int cluster, bool ahead) {
  if constexpr (kLaunched<kShape, kCluster>) {
    using T = typename Types::T;
    using X = typename Types::X;
    using W = typename Types::W;
    constexpr int V = Types::V, kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
    constexpr int kRows = kBlock<kShape> / kThreads, kStages = kShapes[kShape].stages;
    using RowSlots = Slots<X, V, kItems, kBlock<kShape>>;
    using RowScale = Scale<W, T, V, kItems, kBias ? 64 : 128, 0>;
    const int width = kCluster ? kThreads * cluster : kThreads;  // threads of a row
    const int thread = threadIdx.x % kThreads + (kCluster ? Cluster::rank() * kThreads : 0);
    const int n = static_cast<int>(b.n), row_in_block = threadIdx.x / kThreads;
    const int64_t step = (kCluster ? clusters_of(gridDim.x, cluster) : gridDim.x) * kRows;
    const int64_t place = kCluster ? clusters_of(blockIdx.x, cluster) : blockIdx.x;
    unsigned char* const memory = shared_memory() + kScratchBytes;
    RowSum<T, kThreads, kCluster> row_sum(cluster);
    RowScale scale(b.weight, b.weight_offset);
    if constexpr (RowScale::kEarly) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * width + thread) * V;
        if (c < n) scale.load(i, c);
      }
    }
    // As most calls have it: code of its own asks for none of the rest.
    const bool plain = scale.is_plain() && !b.llama && b.dw;
    const auto slots = [&](int stage, int tensor) {
      return RowSlots{reinterpret_cast<uint4*>(memory + (2 * stage + tensor) * RowSlots::kBytes)};
    };

    // dw and db of so many rows are summed in registers before they are put away.
    for (int64_t from = place * kRows; from < b.rows; from += step * kSpan) {
      const int64_t last = from + step * kSpan < b.rows ? from + step * kSpan : b.rows;
      T dw[kItems][V] = {}, db[kBias ? kItems : 1][V] = {};
      const auto fetch = [&](int64_t m, int stage) {
        if (m < last) {
          const X* const x = pinned(row_of<X>(b.x, m) + thread * V);
          const X* const dy = pinned(row_of<X>(b.dy, m) + thread * V);
#pragma unroll
          for (int i = 0; i < kItems; ++i) {
            const int c = (i * width + thread) * V;
            if (c < n) {
              slots(stage, 0).fetch(x, i, i * width * V);
              slots(stage, 1).fetch(dy, i, i * width * V);
            }
          }
        }
        __pipeline_commit();
      };
      // The dot product of a row, which is added to dw and db on the way.
      const auto dot_of_row = [&](auto is_plain, int stage, T r) {
        constexpr bool kPlain = decltype(is_plain)::value;
        T dot = 0;
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * width + thread) * V;
          if (c < n) {
            T x[V], dy[V], columns[V];
            widen(slots(stage, 0).get(i), x);
            widen(slots(stage, 1).get(i), dy);
            scale.template get<kPlain>(i, c, columns);
            dot = dot_of(x, dy, columns, dot);
            if (kPlain || b.dw) add_to_dw<X, kPlain>(b, x, dy, r, dw[i]);
            if constexpr (kBias) {
#pragma unroll
              for (int j = 0; j < V; ++j) db[i][j] += dy[j];
            }
          }
        }
        return dot;
      };
      const auto put_dx = [&](auto is_plain, auto may_add, int64_t m, int stage, T r, T coefficient) {
        constexpr bool kPlain = decltype(is_plain)::value;
        const bool adds = decltype(may_add)::value && b.dsum.data;
        X* const dx_row = pinned(static_cast<X*>(b.dx) + m * n + thread * V);
        const X* const dsum_row = adds ? row_of<X>(b.dsum, m) + thread * V : nullptr;
        // dw and db take half of the 128 registers: what need not be unrolled is not.
        [[maybe_unused]] constexpr int kUnroll = RowScale::kEarly ? kItems : 1;
#pragma unroll kUnroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * width + thread) * V;
          if (c < n) {
            T columns[V], x[V], out[V];
            scale.template get<kPlain>(i, c, columns);
            widen(slots(stage, 0).get(i), x);
            widen(slots(stage, 1).get(i), out);
            dx_in(b, c, x, out, columns, r, coefficient);
            if (adds) add_to_dx(load_pieces<X, V>(dsum_row + i * width * V), out);
            auto dx = narrowed<X>(out);
            store_pieces(dx_row + i * width * V, dx);
          }
        }
      };

      // Where shared memory allows (`ahead`), kAhead rows are on their way while one is worked on, whose
      // slots are then filled for the last of them. The first turns only fetch.
      constexpr int kAhead = kStages - 1;
      const int64_t distance = ahead ? kAhead * step : 0;
      int filled = 0, stage = 0;
#pragma unroll 1
      for (int64_t base = from - distance; base < last; base += step) {
        const int64_t m = base + row_in_block;
        fetch(m + distance, filled);
        if (ahead) filled = filled == kAhead ? 0 : filled + 1;
        if (base < from) continue;
        const bool live = m < last;
        const T r = live ? static_cast<const T*>(b.rstd)[m] : T(0);
        if (ahead) {
          __pipeline_wait_prior(kAhead);
        } else {
          __pipeline_wait_prior(0);
        }
        T dot = 0;
        if (live) settled(plain, [&](auto is_plain) { dot = dot_of_row(is_plain, stage, r); });
        dot = row_sum(dot);
        if (live && b.dx) {
          const T coefficient = coefficient_of(b, r, dot);
          const auto put = [&](auto is_plain, auto may_add) {
            put_dx(is_plain, may_add, m, stage, r, coefficient);
          };
          if (scale.is_plain() && !b.dsum.data) {
            put(std::true_type{}, std::false_type{});
          } else if constexpr (RowScale::kHeld) {
            put(std::true_type{}, std::true_type{});
          } else {
            settled(scale.is_plain(), [&](auto is_plain) { put(is_plain, std::true_type{}); });
          }
        }
        if (ahead) stage = stage == kAhead ? 0 : stage + 1;
      }
      __pipeline_wait_prior(0);
      T* partials = static_cast<T*>(b.workspace) + place * partial_step(b);
      T* const buffer = reinterpret_cast<T*>(memory);
      const bool more = from != place * kRows;
      if (b.dw) {
        put_partial<kThreads>(dw, partials, more, buffer, n, width, thread);
        partials += step / kRows * partial_step(b);
      }
      if constexpr (kBias) put_partial<kThreads>(db, partials, more, buffer, n, width, thread);
      if (kThreads < 128 && last < b.rows) __syncthreads();  // the buffer becomes slots again
    }
  }
}

}  // namespace fused_rmsnorm::cuda
