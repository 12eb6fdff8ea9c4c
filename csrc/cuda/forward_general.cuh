// The forward of calls that the kernels of plain rows do not take: with a weight of several rows, or a gate
// before or after the norm. One kernel per shape of a row serves rows of any alignment, every kind of gate
// and the fused add: these are branches that all threads take alike, outside of the loops over elements.
#pragma once
#include "fold.cuh"
#include "forward_rows.cuh"
#include "gate.cuh"
#include "general.cuh"

namespace fused_rmsnorm::cuda {

// One row of such a call. aligned: everything in the call is.
template <class X>
class GeneralForward {
 public:
  using T = Acc<X>;
  static constexpr int V = 16 / sizeof(X);

  __device__ GeneralForward(const Forward& f, int64_t m, const WeightRows& weights, bool aligned)
      : f_(f), m_(m), x_(row_of<X>(f.x, m)), w_(weights.of(m) * f.n), aligned_(aligned) {}

  struct Columns {
    Vec<X, V> x, other;  // other: of the residual or the gate
  };
  __device__ __forceinline__ Columns load(int c) const {
    Columns in{load_columns<X, V>(x_, c, n(), aligned_), {}};
    if (f_.residual.data) in.other = load_columns<X, V>(row_of<X>(f_.residual, m_), c, n(), aligned_);
    if (f_.z.data) in.other = load_columns<X, V>(row_of<X>(f_.z, m_), c, n(), aligned_);
    return in;
  }
  // A second reading, when the sum has been stored, and x and the residual may be gone.
  __device__ __forceinline__ Columns load_again(int c) const {
    if (!f_.residual.data) return load(c);
    return {load_columns<X, V>(static_cast<const X*>(f_.sum) + m_ * f_.n, c, n(), aligned_), {}};
  }
  // Puts the sum with the residual, where there is one, in x's place, and stores it.
  __device__ __forceinline__ void take_residual(Columns& in, int c) const {
    if (!f_.residual.data) return;
    add(in.x, in.other);
    store_within(static_cast<X*>(f_.sum) + m_ * f_.n, c, n(), in.x, aligned_);
  }
  // What is normalised.
  __device__ __forceinline__ Vec<T, V> value(const Columns& in) const {
    Vec<T, V> v;
    widen(in.x, v.v);
    if (f_.gate == Gate::first) multiply_by_gate(in, v.v);
    return v;
  }
  // Stores y.
  __device__ __forceinline__ void finish(Vec<T, V>& v, const Columns& in, int c, T r) const {
    normalise_in<X>(
        f_, v.v, r,
        [&](T(&scale)[V]) {
          load_scale(f_.weight, f_.weight_offset, scale, [&](T(&w)[V]) { load_weight(f_.weight, c, w); });
        },
        [&](T(&bias)[V]) { load_weight(f_.bias, c, bias); });
    if (f_.gate == Gate::last) {
      if (sizeof(X) < sizeof(T) && f_.llama && !wide()) round_to<X>(v.v);
      multiply_by_gate(in, v.v);
    }
    if constexpr (sizeof(X) == 2) {
      if (f_.y_dtype != f_.x_dtype) return store<T>(v, c);
    }
    store<X>(v, c);
  }

 private:
  __device__ __forceinline__ int n() const { return static_cast<int>(f_.n); }
  __device__ __forceinline__ bool wide() const { return f_.w_dtype != f_.x_dtype; }
  __device__ __forceinline__ void load_weight(const void* weight, int c, T (&out)[V]) const {
    load_columns<X>(weight_row<X>(weight, wide(), w_), wide(), c, n(), aligned_, out);
  }
  __device__ __forceinline__ void multiply_by_gate(const Columns& in, T (&v)[V]) const {
    if constexpr (sizeof(X) < 8) {
      T gate[V], value[V];
      widen(in.other, gate);
      activate<X>(gate, f_.sigmoid, value);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] *= value[j];
    }
  }
  template <class Y>
  __device__ __forceinline__ void store(const Vec<T, V>& v, int c) const {
    auto y = narrowed<Y>(v.v);
    store_within(static_cast<Y*>(f_.y) + m_ * f_.n, c, n(), y, aligned_);
  }

  const Forward& f_;
  int64_t m_;
  const X* x_;
  int64_t w_;
  bool aligned_;
};

// Threads of a multiprocessor that the registers are to leave room for.
template <int kThreads>
constexpr int kGeneralResident = kGeneralBlock<kThreads> < 512 ? 640 / kGeneralBlock<kThreads> : 1;

// Family `registers`. A row is read once, all its loads are issued before the first is used, and an
// exponential is computed once per element.
template <class X, int kThreads, int kItems>
__global__ void __launch_bounds__(kGeneralBlock<kThreads>, kGeneralResident<kThreads>)
    forward_general(Forward f, WeightRows weights, bool aligned) {
  using Row = GeneralForward<X>;
  using T = Acc<X>;
  constexpr int V = Row::V, kRows = kGeneralBlock<kThreads> / kThreads;
  const int thread = threadIdx.x % kThreads, n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  RowSum<T, kThreads, false> row_sum(1);
  for (int64_t base = int64_t{blockIdx.x} * kRows; base < f.rows; base += int64_t{gridDim.x} * kRows) {
    const int64_t m = base + threadIdx.x / kThreads;
    const bool live = m < f.rows;
    const Row row(f, live ? m : 0, weights, aligned);
    typename Row::Columns in[kItems];
    Vec<T, V> v[kItems];
    T sum = 0;
    if (live) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * kThreads + thread) * V;
        if (c < n) in[i] = row.load(c);
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * kThreads + thread) * V;
        if (c < n) {
          row.take_residual(in[i], c);
          v[i] = row.value(in[i]);
          sum = squares(v[i], c, k, sum);
        }
      }
    }
    const T r = rstd_of(f, row_sum(sum));
    if (live) {
      if (f.rstd && thread == 0) static_cast<T*>(f.rstd)[m] = r;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * kThreads + thread) * V;
        if (c < n) row.finish(v[i], in[i], c, r);
      }
    }
  }
}

// Family `two_pass`: a block per row of any length.
template <class X>
__global__ void __launch_bounds__(kGeneralLongThreads, 1)
    forward_general_long(Forward f, WeightRows weights, bool aligned) {
  using Row = GeneralForward<X>;
  using T = Acc<X>;
  constexpr int V = Row::V;
  const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  RowSum<T, kGeneralLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < f.rows; m += gridDim.x) {
    const Row row(f, m, weights, aligned);
    Fold<T> sum;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < (f.residual.data ? n : k); c += kGeneralLongThreads * V) {
      auto in = row.load(c);
      row.take_residual(in, c);
      sum.add(squares(row.value(in), c, k, T(0)));
    }
    const T r = rstd_of(f, row_sum(sum.total()));
    if (f.rstd && threadIdx.x == 0) static_cast<T*>(f.rstd)[m] = r;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < n; c += kGeneralLongThreads * V) {
      const auto in = row.load_again(c);
      auto v = row.value(in);
      row.finish(v, in, c, r);
    }
  }
}

}  // namespace fused_rmsnorm::cuda
