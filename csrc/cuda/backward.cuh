// The backward kernels: dx = r * (g - [j < k] * x * c) + dsum with g = dy * (offset + w) and
// c = r * (r * sum(g * x) / k), and in the same reading of x and dy
//   dw += dy * x * r,  db += dy
// Blocks stay on their multiprocessor and take rows in turn. While a row is reduced, the loads of the
// next are in flight (cp.async into slots of shared memory that belong to one thread each, so that
// no barrier is needed). dw and db are summed in registers; each block (or cluster) writes its sums
// once, as a partial, and finalize.cuh adds the partials in order.
//
// c holds r squared only: r cubed leaves fp32's range for rows near 1e-13.
#pragma once
#include <algorithm>

#include "affine.cuh"
#include "finalize.cuh"
#include "plan.h"
#include "reduce.cuh"
#include "rows.h"

namespace fused_rmsnorm::cuda {

template <class X_, class W_, class D_>
struct BackwardTypes {
  using X = X_;
  using W = W_;
  using D = D_;
  using T = Acc<X>;
  static constexpr int V = 16 / sizeof(X);
};

// The slots of one tensor: for each item and thread one vector, the same place every time.
template <class E, int V, int kItems, int kBlock>
struct Slots {
  static constexpr int kPieces = Vec<E, V>::kPieces;
  static constexpr int kBytes = kItems * kBlock * kPieces * 16;
  uint4* base;

  __device__ __forceinline__ uint4* piece(int item, int i) const {
    return base + (item * kPieces + i) * kBlock + threadIdx.x;
  }
  template <Access kAccess>
  __device__ __forceinline__ void fetch(const RowReader<E, V, kAccess>& row, int item, int c) const {
    if (row.direct(c)) {
#pragma unroll
      for (int i = 0; i < kPieces; ++i) {
        __pipeline_memcpy_async(piece(item, i), reinterpret_cast<const uint4*>(row.row + c) + i, 16);
      }
    } else {
      auto v = row.load(c);
#pragma unroll
      for (int i = 0; i < kPieces; ++i) *piece(item, i) = v.piece(i);
    }
  }
  __device__ __forceinline__ Vec<E, V> get(int item) const {
    Vec<E, V> v;
#pragma unroll
    for (int i = 0; i < kPieces; ++i) v.piece(i) = *piece(item, i);
    return v;
  }
};

__host__ __device__ __forceinline__ bool overwrites(const Backward& b) {
  return b.dx && (b.dx == b.x.data || b.dx == b.dy.data || b.dx == b.dsum.data);
}

// x * r as dw sees it.
template <class X, class T>
__device__ __forceinline__ T normalised(const Backward& b, T x, T r) {
  return b.llama ? T(widen(narrow<X>(x * r))) : x * r;
}

// Writes columns c ... of dx, given g and x.
template <class Types, Access kAccess>
__device__ __forceinline__ void finish(const Backward& b, int64_t m, int c,
                                       const typename Types::T (&scale)[Types::V],
                                       const Vec<typename Types::X, Types::V>& x,
                                       const Vec<typename Types::D, Types::V>& dy, typename Types::T r,
                                       typename Types::T coefficient, bool alone) {
  using X = typename Types::X;
  using T = typename Types::T;
  constexpr int V = Types::V;
  const int k = static_cast<int>(b.k);
  T out[V];
#pragma unroll
  for (int j = 0; j < V; ++j) {
    const T g = widen(dy.v[j]) * scale[j];
    out[j] = r * (c + j < k ? multiply_add(-widen(x.v[j]), coefficient, g) : g);
  }
  if (b.dsum.data) {
    RowReader<X, V, kAccess> row(b.dsum, m, b.n);
    row.alone = alone;
    const auto extra = row.load(c);
#pragma unroll
    for (int j = 0; j < V; ++j) out[j] += widen(extra.v[j]);
  }
  Vec<X, V> dx;
#pragma unroll
  for (int j = 0; j < V; ++j) dx.v[j] = narrow<X>(out[j]);
  store<kAccess>(static_cast<X*>(b.dx) + m * b.n, c, static_cast<int>(b.n), dx);
}

// Adds up what the rows side by side in a block have summed, in their order, and writes the block's
// partial. `buffer` holds one T per column and row.
template <Access kAccess, int kThreads, int kItems, int V, class T>
__device__ __forceinline__ void write_partial(const T (&sums)[kItems][V], T* partial, T* buffer, int n,
                                              int width, int thread) {
  if constexpr (kThreads >= 128) {
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
      const int c = (i * width + thread) * V;
      Vec<T, V> out;
#pragma unroll
      for (int j = 0; j < V; ++j) out.v[j] = sums[i][j];
      if (c < n) store<kAccess>(partial, c, n, out);
    }
  } else {
    constexpr int kColumns = kThreads * kItems * V, kRows = 128 / kThreads;
    const int row = threadIdx.x / kThreads;
    __syncthreads();  // the buffer lies where the slots were, or the sums before these
#pragma unroll
    for (int i = 0; i < kItems; ++i) {
#pragma unroll
      for (int j = 0; j < V; ++j) buffer[row * kColumns + (i * kThreads + thread) * V + j] = sums[i][j];
    }
    __syncthreads();
    for (int c = threadIdx.x; c < n; c += 128) {
      T sum = buffer[c];
      for (int i = 1; i < kRows; ++i) sum += buffer[i * kColumns + c];
      partial[c] = sum;
    }
  }
}

// db of unaligned rows is left the registers it needs: spilling costs more than a second wave of blocks.
template <class Types, int kShape, Access kAccess, bool kBias, bool kCluster>
__global__ void __launch_bounds__(kBlock<kShape>, kBias&& kAccess == Access::any ? 1 : kResident<kShape>)
    backward_rows(Backward b, int cluster, bool ahead, bool alone) {
  using T = typename Types::T;
  using X = typename Types::X;
  using D = typename Types::D;
  constexpr int V = Types::V, kThreads = kShapes[kShape].threads, kItems = kShapes[kShape].items;
  constexpr int kRows = kBlock<kShape> / kThreads, kStages = kShapes[kShape].stages;
  using SlotsX = Slots<X, V, kItems, kBlock<kShape>>;
  using SlotsD = Slots<D, V, kItems, kBlock<kShape>>;
  const int width = kCluster ? kThreads * cluster : kThreads;  // threads of a row
  const int thread = threadIdx.x % kThreads + (kCluster ? Cluster::rank() * kThreads : 0);
  const int n = static_cast<int>(b.n);
  const int64_t step = (kCluster ? gridDim.x / cluster : gridDim.x) * kRows;
  const int64_t place = kCluster ? blockIdx.x / cluster : blockIdx.x;
  unsigned char* const memory = shared_memory() + kScratchBytes;
  RowSum<T, kThreads, kCluster> row_sum(cluster);
  T dw[kItems][V] = {}, db[kBias ? kItems : 1][V] = {};

  const auto slots_x = [&](int stage) {
    return SlotsX{reinterpret_cast<uint4*>(memory + stage * (SlotsX::kBytes + SlotsD::kBytes))};
  };
  const auto slots_dy = [&](int stage) {
    return SlotsD{
        reinterpret_cast<uint4*>(memory + stage * (SlotsX::kBytes + SlotsD::kBytes) + SlotsX::kBytes)};
  };
  const auto fetch = [&](int64_t m, int stage) {
    if (m < b.rows) {
      RowReader<X, V, kAccess> x(b.x, m, n);
      RowReader<D, V, kAccess> dy(b.dy, m, n);
      x.alone = dy.alone = alone;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * width + thread) * V;
        if (c < n) {
          slots_x(stage).fetch(x, i, c);
          slots_dy(stage).fetch(dy, i, c);
        }
      }
    }
    __pipeline_commit();
  };

  // Where shared memory allows (`ahead`), kAhead rows are on their way while one is worked on, whose
  // slots are then filled for the last of them.
  constexpr int kAhead = kStages - 1;
  int stage = 0;
  if (ahead) {
    for (int q = 0; q < kAhead; ++q) fetch(place * kRows + threadIdx.x / kThreads + q * step, q);
  }
  for (int64_t base = place * kRows; base < b.rows; base += step) {
    const int64_t m = base + threadIdx.x / kThreads;
    const bool live = m < b.rows;
    const T r = live ? static_cast<const T*>(b.rstd)[m] : T(0);
    if (ahead) {
      fetch(m + kAhead * step, stage == 0 ? kAhead : stage - 1);
      __pipeline_wait_prior(kAhead);
    } else {
      fetch(m, 0);
      __pipeline_wait_prior(0);
    }
    T dot = 0;
    if (live) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * width + thread) * V;
        if (c < n) {
          const auto x = slots_x(stage).get(i);
          const auto dy = slots_dy(stage).get(i);
          T scale[V];
          load_scale<typename Types::W, kAccess>(b.weight, b.weight_offset, n, c, scale);
#pragma unroll
          for (int j = 0; j < V; ++j) {
            const T g = widen(dy.v[j]), a = widen(x.v[j]);
            dot = multiply_add(g * scale[j], a, dot);
            dw[i][j] = multiply_add(g, normalised<X>(b, a, r), dw[i][j]);
            if constexpr (kBias) db[i][j] += g;
          }
        }
      }
    }
    dot = row_sum(dot);
    if (live && b.dx) {
      const T coefficient = r * (r * dot / static_cast<T>(b.k));
#pragma unroll 1  // dw and db take half of the 128 registers: what need not be unrolled is not
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * width + thread) * V;
        if (c < n) {
          T scale[V];
          load_scale<typename Types::W, kAccess>(b.weight, b.weight_offset, n, c, scale);
          finish<Types, kAccess>(b, m, c, scale, slots_x(stage).get(i), slots_dy(stage).get(i), r,
                                 coefficient, alone);
        }
      }
    }
    if (ahead) stage = stage == kAhead ? 0 : stage + 1;
  }
  __pipeline_wait_prior(0);
  T* partials = static_cast<T*>(b.workspace);
  T* const buffer = reinterpret_cast<T*>(memory);
  if (b.dw) {
    write_partial<kAccess, kThreads>(dw, partials + place * b.n, buffer, n, width, thread);
    partials += (kCluster ? gridDim.x / cluster : gridDim.x) * b.n;
  }
  if constexpr (kBias) {
    if (b.db) write_partial<kAccess, kThreads>(db, partials + place * b.n, buffer, n, width, thread);
  }
}

// Family `two_pass`: dx of rows of any length, a block per row.
template <class Types>
__global__ void __launch_bounds__(kLongThreads, 1) backward_long(Backward b) {
  using T = typename Types::T;
  using X = typename Types::X;
  using D = typename Types::D;
  constexpr int V = Types::V;
  const int n = static_cast<int>(b.n);
  RowSum<T, kLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < b.rows; m += gridDim.x) {
    RowReader<X, V, Access::any> x(b.x, m, n);
    RowReader<D, V, Access::any> dy(b.dy, m, n);
    x.alone = dy.alone = overwrites(b);
    const T r = static_cast<const T*>(b.rstd)[m];
    T dot = 0;
    for (int c = threadIdx.x * V; c < n; c += kLongThreads * V) {
      const auto a = x.load(c);
      const auto g = dy.load(c);
      T scale[V];
      load_scale<typename Types::W, Access::any>(b.weight, b.weight_offset, n, c, scale);
#pragma unroll
      for (int j = 0; j < V; ++j) dot = multiply_add(widen(g.v[j]) * scale[j], T(widen(a.v[j])), dot);
    }
    const T coefficient = r * (r * row_sum(dot) / static_cast<T>(b.k));
    for (int c = threadIdx.x * V; c < n; c += kLongThreads * V) {
      T scale[V];
      load_scale<typename Types::W, Access::any>(b.weight, b.weight_offset, n, c, scale);
      finish<Types, Access::any>(b, m, c, scale, x.load(c), dy.load(c), r, coefficient, x.alone);
    }
  }
}

// Family `two_pass`: dw and db, a thread per column of every partials-th row.
template <class Types>
__global__ void __launch_bounds__(kColumnThreads) backward_columns(Backward b, int partials) {
  using T = typename Types::T;
  using X = typename Types::X;
  using D = typename Types::D;
  const int64_t tiles = (b.n + kColumnThreads - 1) / kColumnThreads;
  const int64_t c = blockIdx.x % tiles * kColumnThreads + threadIdx.x, part = blockIdx.x / tiles;
  if (c >= b.n) return;
  T dw = 0, db = 0;
  for (int64_t m = part; m < b.rows; m += partials) {
    const T g = widen(RowReader<D, 16 / sizeof(D), Access::any>(b.dy, m, b.n).row[c]);
    const T a = widen(RowReader<X, 16 / sizeof(X), Access::any>(b.x, m, b.n).row[c]);
    dw = multiply_add(g, normalised<X>(b, a, static_cast<const T*>(b.rstd)[m]), dw);
    db += g;
  }
  T* out = static_cast<T*>(b.workspace) + part * b.n + c;
  if (b.dw) {
    *out = dw;
    out += partials * b.n;
  }
  if (b.db) *out = db;
}

template <class Types, Access kAccess, bool kBias, int kShape, bool kCluster>
const char* launch_backward_rows(const Backward& b, const Plan& p, void* stream) {
  const Launch launch_as{"backward_rows", partials_of(p, b.rows) * p.cluster, kBlock<kShape>, p.shared_bytes,
                         p.cluster};
  return launch<backward_rows<Types, kShape, kAccess, kBias, kCluster>>(launch_as, stream, b, p.cluster,
                                                                        p.stages > 1, overwrites(b));
}

// The kernel of the plan's shape, found among those from kShape on.
template <class Types, Access kAccess, bool kBias, int kShape = 0>
const char* launch_shape(const Backward& b, const Plan& p, void* stream) {
  if constexpr (kShape < kBackwardShapes) {
    if (p.shape != kShape) return launch_shape<Types, kAccess, kBias, kShape + 1>(b, p, stream);
    if constexpr (kShape >= kClusterShape) {
      if (p.family == Family::cluster)
        return launch_backward_rows<Types, kAccess, kBias, kShape, true>(b, p, stream);
    }
    return launch_backward_rows<Types, kAccess, kBias, kShape, false>(b, p, stream);
  }
  return "no backward kernel for this launch plan";
}

template <class Types>
const char* launch_two_pass(const Backward& b, const Plan& p, void* stream) {
  if (b.dw || b.db) {  // first: dx may overwrite x or dy
    const int partials = static_cast<int>(partials_of(p, b.rows));
    const Launch columns{"backward_columns", ceil_div(b.n, kColumnThreads) * partials, kColumnThreads, 0, 1};
    if (const char* error = launch<backward_columns<Types>>(columns, stream, b, partials)) return error;
  }
  if (!b.dx) return nullptr;
  const Launch rows{"backward_long", std::min(b.rows, kMaxBlocks), kLongThreads, p.shared_bytes, 1};
  return launch<backward_long<Types>>(rows, stream, b);
}

template <class Types>
const char* launch_backward(const Backward& b, const Plan& p, void* stream) {
  if (b.rows) {
    const auto run = [&](auto access) {
      constexpr Access kAccess = decltype(access)::value;
      return b.db ? launch_shape<Types, kAccess, true>(b, p, stream)
                  : launch_shape<Types, kAccess, false>(b, p, stream);
    };
    const char* const error = p.family == Family::two_pass ? launch_two_pass<Types>(b, p, stream)
                              : is_aligned(b, p) ? run(std::integral_constant<Access, Access::aligned>{})
                                                 : run(std::integral_constant<Access, Access::any>{});
    if (error) return error;
  }
  return launch_finalize<typename Types::W, typename Types::T>(b, static_cast<int>(partials_of(p, b.rows)),
                                                               stream);
}

// One translation unit per dtype of x instantiates this.
template <class X>
const char* backward_of(const Backward& b, const Plan& p, void* stream) {
  if constexpr (sizeof(X) == 2) {
    if (b.w_dtype == Dtype::f32) {
      if (b.dy_dtype == Dtype::f32) return launch_backward<BackwardTypes<X, float, float>>(b, p, stream);
      return launch_backward<BackwardTypes<X, float, X>>(b, p, stream);
    }
  }
  return launch_backward<BackwardTypes<X, X, X>>(b, p, stream);
}

}  // namespace fused_rmsnorm::cuda
