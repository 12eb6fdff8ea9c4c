// The forward: y = x * r * (offset + w) + b, optionally of x + residual, which is then written too.
// These are the kernels of aligned rows, templates over the dtypes, the shape of a row (plan.h) and the
// fused add. Everything else is the same for all threads: a weight and nothing else, the common call, has a
// loop of its own, and the rest costs predictable branches. Other rows: forward_any.cuh.
#pragma once
#include "affine.cuh"
#include "plan.h"
#include "reduce.cuh"

namespace fused_rmsnorm::cuda {

// x + residual, rounded to x's dtype.
template <class X, int V>
__device__ __forceinline__ void add(Vec<X, V>& x, const Vec<X, V>& residual) {
  Acc<X> sum[V], more[V];
  widen(x, sum);
  widen(residual, more);
#pragma unroll
  for (int j = 0; j < V; ++j) sum[j] += more[j];
  x = narrowed<X>(sum);
}

// Sum of squares of the columns below k. What lies beyond is not looked at, nor waited for. kAll: none
// does.
template <bool kAll = false, class T, class X, int V>
__device__ __forceinline__ T squares(const Vec<X, V>& v, int c, int k, T sum) {
  T x[V];
  if (kAll || c + V <= k) {
    widen(v, x);
#pragma unroll
    for (int j = 0; j < V; ++j) sum = multiply_add(x[j], x[j], sum);
  } else if (c < k) {
    widen(v, x);
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (c + j < k) sum = multiply_add(x[j], x[j], sum);
    }
  }
  return sum;
}

template <class T>
__device__ __forceinline__ T rstd_of(const Forward& f, T squares_sum) {
  return inverse_sqrt(squares_sum / static_cast<T>(static_cast<int>(f.k)) + static_cast<T>(f.eps));
}
// In place of the sums of squares of rows in flight. Of several, each of whose kThreads are in one warp,
// every thread computes one and gets the others by shuffles: a division and a root are some forty
// instructions.
template <int kThreads, class T, int kFlight>
__device__ __forceinline__ void make_rstds(const Forward& f, T (&rows)[kFlight]) {
  T mine = rows[0];
#pragma unroll
  for (unsigned q = 1; q < kFlight; ++q) {
    const T other = rows[q];
    mine = threadIdx.x % kFlight == q ? other : mine;
  }
  mine = rstd_of(f, mine);
#pragma unroll
  for (int q = 0; q < kFlight; ++q)
    rows[q] = kFlight == 1 ? mine : __shfl_sync(0xffffffffu, mine, q, kThreads);
}

// y of a vector of columns. kAlone: as apply_weight() has it. llama: as f says, or a constant.
template <class Y, bool kAlone = false, class T, class X, int V, class LoadScale, class LoadBias>
__device__ __forceinline__ Vec<Y, V> normalise(const Forward& f, const Vec<X, V>& x, T r, bool llama,
                                               LoadScale load_scale, LoadBias load_bias) {
  T out[V];
  widen(x, out);
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] *= r;
  apply_weight<X, kAlone>(f, llama, out, load_scale, load_bias);
  return narrowed<Y>(out);
}

// Where a thread keeps its vectors of a row between the statistic and the store: in registers, or,
// of 1024 threads, which have 64 each, in slots of shared memory that no other thread touches.
constexpr int kSlotsFrom = 1024;

template <class V, int kItems, int kThreads, bool kInSlots>
struct Held {
  V v[kItems];
  __device__ __forceinline__ V& operator[](int i) { return v[i]; }
};
template <class V, int kItems, int kThreads>
struct Held<V, kItems, kThreads, true> {
  __device__ __forceinline__ V& operator[](int i) {
    return reinterpret_cast<V*>(shared_memory() + kScratchBytes)[i * kThreads + threadIdx.x];
  }
};

// Threads of a multiprocessor that the registers are to leave room for: left alone, the compiler takes
// so many that five blocks of 128 fit. A wider weight, and rows side by side in a block, need up to 80; the
// fused add and clusters get what they need.
template <class Types, int kShape, bool kAdd, bool kCluster>
constexpr int kForwardResident =
    kAdd || kCluster ? 1
    : sizeof(typename Types::W) > sizeof(typename Types::X) || kShapes[kShape].threads < kBlock<kShape>
        ? (kBlock<kShape> < 512 ? 768 / kBlock<kShape> : 1)
        : 1024 / kBlock<kShape>;

// Families `registers` and `cluster`: a row is read once, and all its loads are issued before the
// first is used; of short rows those of several.
template <class Types, int kShape, bool kAdd, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>, kForwardResident<Types, kShape, kAdd, kCluster>)
    forward_rows(Forward f, int cluster) {
  if constexpr (kLaunched<kShape, kCluster>) {
    using T = typename Types::T;
    using X = typename Types::X;
    using W = typename Types::W;
    constexpr int V = Types::V, kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
    constexpr int kRows = kBlock<kShape> / kThreads, kFlight = kShapes[kShape].flight;
    constexpr bool kInSlots = kThreads >= kSlotsFrom;
    constexpr bool kBoth = kAdd && !kInSlots;  // x and residual are read before either is used
    [[maybe_unused]] constexpr int kUnroll = kInSlots ? 1 : kItems;
    const int width = kCluster ? kThreads * cluster : kThreads;  // threads of a row
    const int thread = threadIdx.x % kThreads + (kCluster ? Cluster::rank() * kThreads : 0);
    const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
    const int64_t step = int64_t{kCluster ? clusters_of(gridDim.x, cluster) : gridDim.x} * (kRows * kFlight);
    RowSum<T, kThreads, kCluster> row_sum(cluster);
    using RowScale = Scale<W, T, V, kItems, 32, sizeof(W) == sizeof(X) && !kInSlots ? 64 : 0>;
    RowScale scale(f.weight, f.weight_offset);
    // A weight and nothing else, as most calls have it, half of them in llama mode: loops of their own ask
    // for none of the rest. Under a wider weight torch's llama mode makes a wider y, and has no loop here.
    constexpr bool kLlamaLoop = sizeof(X) < sizeof(T) && std::is_same_v<W, X>;
    const bool rounds = sizeof(X) < sizeof(T) && f.llama;
    const bool plain = scale.is_plain() && !f.bias && (kLlamaLoop || !rounds);

    for (int64_t base = int64_t{kCluster ? clusters_of(blockIdx.x, cluster) : blockIdx.x} * (kRows * kFlight);
         base < f.rows; base += step) {
      const int64_t first = base + threadIdx.x / kThreads;
      const int64_t after = f.rows - first;
      const int left = after < kRows * kFlight ? static_cast<int>(after) : kRows * kFlight;
      Held<Vec<X, V>, kItems, kThreads, kInSlots> x[kFlight];
      Vec<X, V> residual[kFlight][kBoth ? kItems : 1];
      const X *row = row_of<X>(f.x, first), *residual_row = kBoth ? row_of<X>(f.residual, first) : nullptr;
#pragma unroll
      for (int q = 0; q < kFlight; ++q) {
        if (q) {
          row = next_row<kRows>(f.x, row, first + q * kRows);
          if constexpr (kBoth) residual_row = next_row<kRows>(f.residual, residual_row, first + q * kRows);
        }
#pragma unroll kUnroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * width + thread) * V;
          if (q * kRows < left && c < n) {
            x[q][i] = load_pieces<X, V>(row + c);
            if constexpr (kBoth) residual[q][i] = load_pieces<X, V>(residual_row + c);
          }
        }
      }
      if constexpr (RowScale::kEarly) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * width + thread) * V;
          if (c < n) scale.load(i, c);
        }
      } else {
        ask_for<W>(f.weight, n, thread, width);
      }
      T r[kFlight];
#pragma unroll
      for (int q = 0; q < kFlight; ++q) {
        T sum = 0;
        if (q * kRows < left) {
          const int64_t m = first + q * kRows;
          const X* const residual_row = kAdd && !kBoth ? row_of<X>(f.residual, m) : nullptr;
          X* const sum_row = kAdd ? pinned(static_cast<X*>(f.sum) + m * n + thread * V) : nullptr;
#pragma unroll kUnroll
          for (int i = 0; i < kItems; ++i) {
            const int c = (i * width + thread) * V;
            if (c < n) {
              if constexpr (kAdd) {
                if constexpr (kBoth) {
                  add(x[q][i], residual[q][i]);
                } else {
                  add(x[q][i], load_pieces<X, V>(residual_row + c));
                }
                store_pieces(sum_row + i * width * V, x[q][i]);
              }
              sum = squares(x[q][i], c, k, sum);
            }
          }
        }
        r[q] = row_sum(sum);
      }
      make_rstds<kThreads>(f, r);
      X* y_row = pinned(static_cast<X*>(f.y) + first * n + thread * V);
#pragma unroll
      for (int q = 0; q < kFlight; ++q) {
        if (q) y_row += kRows * n;
        if (q * kRows >= left) continue;
        if (f.rstd && thread == 0) static_cast<T*>(f.rstd)[first + q * kRows] = r[q];
        const auto finish = [&](auto is_plain, bool llama) {
          constexpr bool kPlain = decltype(is_plain)::value;
#pragma unroll kUnroll
          for (int i = 0; i < kItems; ++i) {
            const int c = (i * width + thread) * V;
            if (c < n) {
              auto y = normalise<X, kPlain>(
                  f, x[q][i], r[q], llama, [&](T(&columns)[V]) { scale.template get<kPlain>(i, c, columns); },
                  [&](T(&bias)[V]) { load_aligned<W>(f.bias, c, bias); });
              store_pieces(y_row + i * width * V, y);
            }
          }
        };
        settled(plain, [&](auto is_plain) {
          if constexpr (!decltype(is_plain)::value) {
            finish(is_plain, rounds);
          } else if constexpr (kLlamaLoop) {
            settled(rounds, [&](auto is_llama) { finish(is_plain, decltype(is_llama)::value); });
          } else {
            finish(is_plain, false);
          }
        });
      }
    }
  }
}

}  // namespace fused_rmsnorm::cuda
