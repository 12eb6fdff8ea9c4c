// The forward kernels: y = x * r * (offset + w) + b, optionally of x + residual, which is then
// written too. Templates over the dtypes, the shape of a row (plan.h), how it lies in memory and the
// fused add; everything else is the same for all threads and costs a predictable branch.
#pragma once
#include <algorithm>

#include "affine.cuh"
#include "plan.h"
#include "reduce.cuh"
#include "rows.h"

namespace fused_rmsnorm::cuda {

template <class X_, class W_, class Y_>
struct ForwardTypes {
  using X = X_;
  using W = W_;
  using Y = Y_;
  using T = Acc<X>;
  static constexpr int V = 16 / sizeof(X);
};

// x = x + residual, rounded to x's dtype, and written to sum.
template <Access kAccess, class X, int V>
__device__ __forceinline__ void add(const Forward& f, int64_t m, int c, Vec<X, V>& x,
                                    const Vec<X, V>& residual) {
#pragma unroll
  for (int j = 0; j < V; ++j) x.v[j] = narrow<X>(widen(x.v[j]) + widen(residual.v[j]));
  store<kAccess>(static_cast<X*>(f.sum) + m * f.n, c, static_cast<int>(f.n), x);
}

// Sum of squares of the columns below k. What lies beyond is not looked at, nor waited for.
template <class T, class X, int V>
__device__ __forceinline__ T squares(const Vec<X, V>& v, int c, int k, T sum) {
  if (c + V <= k) {
#pragma unroll
    for (int j = 0; j < V; ++j) sum = multiply_add(widen(v.v[j]), widen(v.v[j]), sum);
  } else if (c < k) {
#pragma unroll
    for (int j = 0; j < V; ++j) {
      if (c + j < k) sum = multiply_add(widen(v.v[j]), widen(v.v[j]), sum);
    }
  }
  return sum;
}

template <bool kAdd>
__device__ __forceinline__ bool overwrites(const Forward& f) {
  return f.y == f.x.data || (kAdd && f.sum == f.residual.data);
}

template <class T>
__device__ __forceinline__ T rstd_of(const Forward& f, T squares_sum) {
  return inverse_sqrt(squares_sum / static_cast<T>(f.k) + static_cast<T>(f.eps));
}

// Normalises, scales and writes columns c ... c + V - 1.
template <class Types, Access kAccess>
__device__ __forceinline__ void finish(const Forward& f, int64_t m, int c,
                                       const Vec<typename Types::X, Types::V>& x, typename Types::T r) {
  using T = typename Types::T;
  using W = typename Types::W;
  using Y = typename Types::Y;
  constexpr int V = Types::V;
  T scale[V], out[V];
  load_scale<W, kAccess>(f.weight, f.weight_offset, f.n, c, scale);
#pragma unroll
  for (int j = 0; j < V; ++j) {
    out[j] = widen(x.v[j]) * r;
    if (f.llama) out[j] = widen(narrow<typename Types::X>(out[j]));
  }
  if (f.bias) {
    const auto b = load_affine<W, kAccess, V>(f.bias, f.n, c);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] = multiply_add(out[j], scale[j], static_cast<T>(widen(b.v[j])));
  } else {
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] *= scale[j];
  }
  Vec<Y, V> y;
#pragma unroll
  for (int j = 0; j < V; ++j) y.v[j] = narrow<Y>(out[j]);
  store<kAccess>(static_cast<Y*>(f.y) + m * f.n, c, static_cast<int>(f.n), y);
}

// Where a thread keeps its vectors of a row between the statistic and the store: in registers, or,
// where 64 or 128 registers are too few for the reading of unaligned rows beside them, in slots of
// shared memory that no other thread touches.
template <int kThreads, Access kAccess>
constexpr bool kSlots = kThreads == 1024 || (kThreads == 512 && kAccess == Access::any);

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
// so many that five blocks of 128 fit. The others hold more and would spill; they get what they need.
template <int kShape, Access kAccess, bool kAdd, bool kCluster>
constexpr int kForwardResident = kAccess == Access::aligned && !kAdd && !kCluster ? 1024 / kBlock<kShape> : 1;

// Families `registers` and `cluster`: a row is read once, and all its loads are issued before the
// first is used; of short rows those of several.
template <class Types, int kShape, Access kAccess, bool kAdd, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>, kForwardResident<kShape, kAccess, kAdd, kCluster>)
    forward_rows(Forward f, int cluster) {
  using T = typename Types::T;
  using X = typename Types::X;
  constexpr int V = Types::V, kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
  constexpr int kRows = kBlock<kShape> / kThreads, kFlight = kShapes[kShape].flight;
  constexpr bool kInSlots = kSlots<kThreads, kAccess>;
  constexpr bool kBoth = kAdd && !kInSlots;  // x and residual are read before either is used
  [[maybe_unused]] constexpr int kUnroll = kInSlots ? 1 : kItems;
  const int width = kCluster ? kThreads * cluster : kThreads;  // threads of a row
  const int thread = threadIdx.x % kThreads + (kCluster ? Cluster::rank() * kThreads : 0);
  const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  const int64_t step = int64_t{kCluster ? gridDim.x / cluster : gridDim.x} * (kRows * kFlight);
  RowSum<T, kThreads, kCluster> row_sum(cluster);

  for (int64_t base = int64_t{kCluster ? blockIdx.x / cluster : blockIdx.x} * (kRows * kFlight);
       base < f.rows; base += step) {
    const int64_t first = base + threadIdx.x / kThreads;
    Held<Vec<X, V>, kItems, kThreads, kInSlots> x[kFlight];
    Vec<X, V> residual[kFlight][kBoth ? kItems : 1];
#pragma unroll
    for (int q = 0; q < kFlight; ++q) {
      const int64_t m = first + q * kRows;
      if (m >= f.rows) continue;
      RowReader<X, V, kAccess> row(f.x, m, n), residual_row(kAdd ? f.residual : f.x, m, n);
      row.alone = residual_row.alone = overwrites<kAdd>(f);
#pragma unroll kUnroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * width + thread) * V;
        if (c < n) {
          x[q][i] = row.load(c);
          if constexpr (kBoth) residual[q][i] = residual_row.load(c);
        }
      }
    }
#pragma unroll
    for (int q = 0; q < kFlight; ++q) {
      const int64_t m = first + q * kRows;
      T sum = 0;
      if (m < f.rows) {
        RowReader<X, V, kAccess> residual_row(kAdd ? f.residual : f.x, m, n);
        residual_row.alone = overwrites<kAdd>(f);
#pragma unroll kUnroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * width + thread) * V;
          if (c < n) {
            if constexpr (kBoth) {
              add<kAccess>(f, m, c, x[q][i], residual[q][i]);
            } else if constexpr (kAdd) {
              add<kAccess>(f, m, c, x[q][i], residual_row.load(c));
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
          if (c < n) finish<Types, kAccess>(f, m, c, x[q][i], r);
        }
      }
    }
  }
}

// Family `two_pass`: a block per row of any length. The barrier of the sum lies between what is
// written to f.sum and what is read back from it.
template <class Types, bool kAdd>
__global__ void __launch_bounds__(kLongThreads) forward_long(Forward f) {
  using T = typename Types::T;
  using X = typename Types::X;
  constexpr int V = Types::V;
  using Reader = RowReader<X, V, Access::any>;
  const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  RowSum<T, kLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < f.rows; m += gridDim.x) {
    Reader row(f.x, m, n), residual_row(kAdd ? f.residual : f.x, m, n);
    row.alone = residual_row.alone = overwrites<kAdd>(f);
    T sum = 0;
    for (int c = threadIdx.x * V; c < (kAdd ? n : k); c += kLongThreads * V) {
      Vec<X, V> x = row.load(c);
      if constexpr (kAdd) add<Access::any>(f, m, c, x, residual_row.load(c));
      sum = squares(x, c, k, sum);
    }
    const T r = rstd_of(f, row_sum(sum));
    if (f.rstd && threadIdx.x == 0) static_cast<T*>(f.rstd)[m] = r;
    Reader again = row;
    if constexpr (kAdd) again = Reader(static_cast<const X*>(f.sum) + m * f.n, n);
    for (int c = threadIdx.x * V; c < n; c += kLongThreads * V) {
      finish<Types, Access::any>(f, m, c, again.load(c), r);
    }
  }
}

template <class Types, bool kAdd, Access kAccess, int kShape, bool kCluster>
const char* launch_forward_rows(const Forward& f, const Plan& p, void* stream) {
  constexpr Shape shape = kShapes[kShape];
  const Launch launch_as{
      "forward_rows", std::min(ceil_div(f.rows, p.rows_per_block), p.max_grid) * p.cluster, kBlock<kShape>,
      p.shared_bytes + (kSlots<shape.threads, kAccess> ? shape.threads * shape.items * 16 : 0), p.cluster};
  return launch<forward_rows<Types, kShape, kAccess, kAdd, kCluster>>(launch_as, stream, f, p.cluster);
}

// The kernel of the plan's shape, found among those from kShape on.
template <class Types, bool kAdd, Access kAccess, int kShape = 0>
const char* launch_shape(const Forward& f, const Plan& p, void* stream) {
  if constexpr (kShape < kForwardShapes) {
    if (p.shape != kShape) return launch_shape<Types, kAdd, kAccess, kShape + 1>(f, p, stream);
    if constexpr (kShape >= kClusterShape) {
      if (p.family == Family::cluster)
        return launch_forward_rows<Types, kAdd, kAccess, kShape, true>(f, p, stream);
    }
    return launch_forward_rows<Types, kAdd, kAccess, kShape, false>(f, p, stream);
  }
  return "no forward kernel for this launch plan";
}

template <class Types, bool kAdd>
const char* launch_forward(const Forward& f, const Plan& p, void* stream) {
  if (p.family == Family::two_pass) {
    const Launch launch_as{"forward_long", std::min(f.rows, p.max_grid), kLongThreads, p.shared_bytes, 1};
    return launch<forward_long<Types, kAdd>>(launch_as, stream, f);
  }
  if (is_aligned(f, p)) return launch_shape<Types, kAdd, Access::aligned>(f, p, stream);
  return launch_shape<Types, kAdd, Access::any>(f, p, stream);
}

// One translation unit per dtype of x instantiates this.
template <class X>
const char* forward_of(const Forward& f, const Plan& p, void* stream) {
  const auto run = [&](auto types) {
    using Types = decltype(types);
    return f.residual.data ? launch_forward<Types, true>(f, p, stream)
                           : launch_forward<Types, false>(f, p, stream);
  };
  if constexpr (sizeof(X) == 2) {
    if (f.w_dtype == Dtype::f32) {
      if (f.y_dtype == Dtype::f32) return run(ForwardTypes<X, float, float>{});
      return run(ForwardTypes<X, float, X>{});
    }
  }
  return run(ForwardTypes<X, X, X>{});
}

}  // namespace fused_rmsnorm::cuda
