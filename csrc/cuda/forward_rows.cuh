// The forward: y = x * r * (offset + w) + b, optionally of x + residual, which is then written too.
// These are the kernels of aligned rows, templates over the dtypes, the shape of a row (plan.h) and the
// fused add; everything else is the same for all threads and costs a predictable branch. Other rows:
// forward_any.cuh.
#pragma once
#include "affine.cuh"
#include "plan.h"
#include "reduce.cuh"

namespace fused_rmsnorm::cuda {

// x + residual, rounded to x's dtype.
template <class X, int V>
__device__ __forceinline__ void add(Vec<X, V>& x, const Vec<X, V>& residual) {
#pragma unroll
  for (int j = 0; j < V; ++j) x.v[j] = narrow<X>(widen(x.v[j]) + widen(residual.v[j]));
}

// Sum of squares of the columns below k. What lies beyond is not looked at, nor waited for.
template <class T, class X, int V>
__device__ __forceinline__ T squares(const Vec<X, V>& v, int c, int k, T sum) {
  if (c >= k) return sum;
  T x[V];
  widen(v, x);
  if (c + V <= k) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum = multiply_add(x[j], x[j], sum);
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (c + j < k) sum = multiply_add(x[j], x[j], sum);
    }
  }
  return sum;
}

template <class T>
__device__ __forceinline__ T rstd_of(const Forward& f, T squares_sum) {
  return inverse_sqrt(squares_sum / static_cast<T>(f.k) + static_cast<T>(f.eps));
}

// What x's columns, in `out`, become before they are stored.
template <class X, class T, int V, class LoadScale, class LoadBias>
__device__ __forceinline__ void normalise_in(const Forward& f, T (&out)[V], T r, LoadScale load_scale,
                                             LoadBias load_bias) {
#pragma unroll
  for (int j = 0; j < V; ++j) out[j] *= r;
  apply_weight<X>(f, out, load_scale, load_bias);
}

// y of a vector of columns.
template <class Y, class T, class X, int V, class LoadScale, class LoadBias>
__device__ __forceinline__ Vec<Y, V> normalise(const Forward& f, const Vec<X, V>& x, T r,
                                               LoadScale load_scale, LoadBias load_bias) {
  T out[V];
  widen(x, out);
  normalise_in<X>(f, out, r, load_scale, load_bias);
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
// so many that five blocks of 128 fit. A wider weight and several rows in flight need up to 80; the fused
// add and clusters get what they need.
template <class Types, int kShape, bool kAdd, bool kCluster>
constexpr int kForwardResident =
    kAdd || kCluster ? 1
    : sizeof(typename Types::W) > sizeof(typename Types::X) || kShapes[kShape].flight > 1
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
    constexpr int V = Types::V, kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
    constexpr int kRows = kBlock<kShape> / kThreads, kFlight = kShapes[kShape].flight;
    constexpr bool kInSlots = kThreads >= kSlotsFrom;
    constexpr bool kBoth = kAdd && !kInSlots;  // x and residual are read before either is used
    [[maybe_unused]] constexpr int kUnroll = kInSlots ? 1 : kItems;
    const int width = kCluster ? kThreads * cluster : kThreads;  // threads of a row
    const int thread = threadIdx.x % kThreads + (kCluster ? Cluster::rank() * kThreads : 0);
    const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
    const int64_t step = int64_t{kCluster ? gridDim.x / cluster : gridDim.x} * (kRows * kFlight);
    RowSum<T, kThreads, kCluster> row_sum(cluster);
    using RowScale = Scale<typename Types::W, T, V, kItems, 32>;
    RowScale scale(f.weight, f.weight_offset);

    for (int64_t base = int64_t{kCluster ? blockIdx.x / cluster : blockIdx.x} * (kRows * kFlight);
         base < f.rows; base += step) {
      const int64_t first = base + threadIdx.x / kThreads;
      Held<Vec<X, V>, kItems, kThreads, kInSlots> x[kFlight];
      Vec<X, V> residual[kFlight][kBoth ? kItems : 1];
#pragma unroll
      for (int q = 0; q < kFlight; ++q) {
        const int64_t m = first + q * kRows;
        if (m >= f.rows) continue;
        const X* const row = row_of<X>(f.x, m);
        const X* const residual_row = kBoth ? row_of<X>(f.residual, m) : nullptr;
#pragma unroll kUnroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * width + thread) * V;
          if (c < n) {
            x[q][i] = load_pieces<X, V>(row + c);
            if constexpr (kBoth) residual[q][i] = load_pieces<X, V>(residual_row + c);
          }
        }
      }
      if constexpr (RowScale::kHeld) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * width + thread) * V;
          if (c < n) scale.load(i, c);
        }
      } else {
        ask_for<typename Types::W>(f.weight, n, thread, width);
      }
#pragma unroll
      for (int q = 0; q < kFlight; ++q) {
        const int64_t m = first + q * kRows;
        T sum = 0;
        if (m < f.rows) {
          const X* const residual_row = kAdd && !kBoth ? row_of<X>(f.residual, m) : nullptr;
          X* const sum_row = static_cast<X*>(f.sum) + m * n;
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
                store_pieces(sum_row + c, x[q][i]);
              }
              sum = squares(x[q][i], c, k, sum);
            }
          }
        }
        const T r = rstd_of(f, row_sum(sum));
        if (m < f.rows) {
          if (f.rstd && thread == 0) static_cast<T*>(f.rstd)[m] = r;
#pragma unroll kUnroll
          for (int i = 0; i < kItems; ++i) {
            const int c = (i * width + thread) * V;
            if (c < n) {
              auto y = normalise<X>(
                  f, x[q][i], r, [&](T(&columns)[V]) { scale.get(i, c, columns); },
                  [&](T(&bias)[V]) { load_aligned<typename Types::W>(f.bias, c, bias); });
              store_pieces(static_cast<X*>(f.y) + m * n + c, y);
            }
          }
        }
      }
    }
  }
}

}  // namespace fused_rmsnorm::cuda
