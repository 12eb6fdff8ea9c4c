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
      : f_(f), m_(m), x_(row_of<X>(f.x, m)), w_(weights.of(m)), aligned_(aligned) {}

  // What is normalised: x; the sum with a residual, which is stored; or x under a gate.
  __device__ __forceinline__ Vec<T, V> load(int c) const {
    auto x = load_columns<X, V>(x_, c, n(), aligned_);
    Vec<T, V> v;
    if (f_.residual.data) {
      add(x, load_columns<X, V>(row_of<X>(f_.residual, m_), c, n(), aligned_));
      store_within(static_cast<X*>(f_.sum) + m_ * f_.n, c, 0, n(), x, aligned_);
    }
    widen(x, v.v);
    if constexpr (sizeof(X) < 8) {
      if (f_.gate == Gate::first) multiply_by_gate(c, v.v);
    }
    return v;
  }
  // The same once more. The sum has been stored then, and x and the residual may be gone.
  __device__ __forceinline__ Vec<T, V> load_again(int c) const {
    if (!f_.residual.data) return load(c);
    Vec<T, V> v;
    widen(load_columns<X, V>(static_cast<const X*>(f_.sum) + m_ * f_.n, c, n(), aligned_), v.v);
    return v;
  }
  // Stores y.
  __device__ __forceinline__ void finish(Vec<T, V>& v, int c, T r) const {
    normalise_in<X>(
        f_, v.v, r,
        [&](T(&scale)[V]) {
          load_scale(f_.weight, f_.weight_offset, scale, [&](T(&w)[V]) { load_weight(f_.weight, c, w); });
        },
        [&](T(&bias)[V]) { load_weight(f_.bias, c, bias); });
    if constexpr (sizeof(X) < 8) {
      if (f_.gate == Gate::last) {
        if (sizeof(X) < sizeof(T) && f_.llama && !wide()) widen(narrowed<X>(v.v), v.v);
        multiply_by_gate(c, v.v);
      }
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
    load_columns<X>(weight_row<X>(weight, wide(), w_, f_.n), wide(), c, n(), aligned_, out);
  }
  __device__ __forceinline__ void multiply_by_gate(int c, T (&v)[V]) const {
    const auto z = load_columns<X, V>(row_of<X>(f_.z, m_), c, n(), aligned_);
#pragma unroll
    for (int j = 0; j < V; ++j) v[j] *= activate(widen(z.v[j]), f_.sigmoid);
  }
  template <class Y>
  __device__ __forceinline__ void store(const Vec<T, V>& v, int c) const {
    auto y = narrowed<Y>(v.v);
    store_within(static_cast<Y*>(f_.y) + m_ * f_.n, c, 0, n(), y, aligned_);
  }

  const Forward& f_;
  int64_t m_;
  const X* x_;
  int64_t w_;
  bool aligned_;
};

// Family `registers`. What is normalised stays in registers: it is read once, and an exponential is computed
// once per element.
template <class X, int kThreads, int kItems>
__global__ void __launch_bounds__(kGeneralBlock<kThreads>, 1)
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
    Vec<T, V> v[kItems];
    T sum = 0;
    if (live) {
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * kThreads + thread) * V;
        if (c < n) v[i] = row.load(c);
      }
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * kThreads + thread) * V;
        if (c < n) sum = squares(v[i], c, k, sum);
      }
    }
    const T r = rstd_of(f, row_sum(sum));
    if (live) {
      if (f.rstd && thread == 0) static_cast<T*>(f.rstd)[m] = r;
#pragma unroll
      for (int i = 0; i < kItems; ++i) {
        const int c = (i * kThreads + thread) * V;
        if (c < n) row.finish(v[i], c, r);
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
    for (int c = threadIdx.x * V; c < (f.residual.data ? n : k); c += kGeneralLongThreads * V)
      sum.add(squares(row.load(c), c, k, T(0)));
    const T r = rstd_of(f, row_sum(sum.total()));
    if (f.rstd && threadIdx.x == 0) static_cast<T*>(f.rstd)[m] = r;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < n; c += kGeneralLongThreads * V) {
      auto v = row.load_again(c);
      row.finish(v, c, r);
    }
  }
}

}  // namespace fused_rmsnorm::cuda
