// The forward of calls that the kernels of plain rows do not take: with a weight of several rows, or a gate
// before or after the norm. What models ask for (is_usual() of rows.h) has, but in fp64, a kernel per gate
// and shape of a row. Another of each shape serves all the rest, rows of any alignment, every kind of gate
// and the fused add, by branches that all threads take alike, outside of the loops over elements.
#pragma once
#include "fold.cuh"
#include "forward_rows.cuh"
#include "gate.cuh"
#include "general.cuh"

namespace fused_rmsnorm::cuda {

// One row of such a call. aligned: everything in the call is.
template <class X, Form kForm>
class GeneralForward {
 public:
  using T = Acc<X>;
  static constexpr int V = 16 / sizeof(X);
  static constexpr bool kUsual = kIsUsual<kForm>;

  // first: the first column that this thread asks for.
  __device__ GeneralForward(const Forward& f, int64_t m, const WeightRows& weights, int first, bool aligned)
      : f_(f),
        m_(m),
        first_(kUsual ? first : 0),
        aligned_(kUsual || aligned),
        x_(kUsual ? pinned(row_of<X>(f.x, m) + first) : row_of<X>(f.x, m)),
        w_(weights.of(m) * f.n + first_) {}

  struct Columns {
    Vec<X, V> x, other;  // other: of the residual or the gate
  };
  __device__ __forceinline__ Columns load(int c) const {
    Columns in{load_row(x_, c), {}};
    if (adds()) in.other = load_row(row_of<X>(f_.residual, m_) + first_, c);
    if (gate() != Gate::none) in.other = load_row(row_of<X>(f_.z, m_) + first_, c);
    return in;
  }
  // A second reading, when the sum has been stored, and x and the residual may be gone.
  __device__ __forceinline__ Columns load_again(int c) const {
    if (!adds()) return load(c);
    return {load_row(static_cast<const X*>(f_.sum) + m_ * f_.n + first_, c), {}};
  }
  // Puts the sum with the residual, where there is one, in x's place, and stores it.
  __device__ __forceinline__ void take_residual(Columns& in, int c) const {
    if (!adds()) return;
    add(in.x, in.other);
    store_row(static_cast<X*>(f_.sum), in.x, c);
  }
  // What is normalised.
  __device__ __forceinline__ Vec<T, V> value(const Columns& in) const {
    Vec<T, V> v;
    widen(in.x, v.v);
    if (gate() == Gate::first) multiply_by_gate(in, v.v);
    return v;
  }
  // Stores y.
  __device__ __forceinline__ void finish(Vec<T, V>& v, const Columns& in, int c, T r) const {
    if constexpr (kUsual && sizeof(X) < sizeof(T)) {
      settled(f_.llama, [&](auto is_llama) { finish(v, in, c, r, decltype(is_llama)::value); });
    } else {
      finish(v, in, c, r, f_.llama);
    }
  }

 private:
  __device__ __forceinline__ void finish(Vec<T, V>& v, const Columns& in, int c, T r, bool llama) const {
#pragma unroll
    for (int j = 0; j < V; ++j) v.v[j] *= r;
    apply_weight<X, kIsUsualGate<kForm>>(
        f_, llama, v.v,
        [&](T(&scale)[V]) {
          if (kUsual && f_.weight_offset == 0) return load_weight(f_.weight, c, scale);
          load_scale(f_.weight, f_.weight_offset, scale, [&](T(&w)[V]) { load_weight(f_.weight, c, w); });
        },
        [&](T(&bias)[V]) { load_weight(f_.bias, c, bias); });
    if (gate() == Gate::last) {
      if (sizeof(X) < sizeof(T) && llama && !wide()) round_to<X>(v.v);
      multiply_by_gate(in, v.v);
    }
    if constexpr (sizeof(X) == 2 && !kUsual) {
      if (f_.y_dtype != f_.x_dtype) return store<T>(v, c);
    }
    store<X>(v, c);
  }

  __device__ __forceinline__ int left(int c) const { return static_cast<int>(f_.n) - c; }
  __device__ __forceinline__ bool aligned() const { return kUsual || aligned_; }
  __device__ __forceinline__ bool wide() const { return f_.w_dtype != f_.x_dtype; }
  __device__ __forceinline__ bool adds() const { return !kUsual && f_.residual.data; }
  __device__ __forceinline__ Gate gate() const {
    return kUsual || !kMayBeGated<X> ? kGateOf<kForm> : f_.gate;
  }
  __device__ __forceinline__ Vec<X, V> load_row(const X* row, int c) const {
    return load_columns<X, V>(row + (c - first_), left(c), aligned());
  }
  __device__ __forceinline__ void load_weight(const void* weight, int c, T (&out)[V]) const {
    load_columns<X>(weight_row<X>(weight, wide(), w_), wide(), c - first_, left(c), aligned(), out);
  }
  __device__ __forceinline__ void multiply_by_gate(const Columns& in, T (&v)[V]) const {
    if constexpr (kMayBeGated<X>) {
      T gate[V], value[V];
      widen(in.other, gate);
      activate<X>(gate, !kUsual && f_.sigmoid, value);
#pragma unroll
      for (int j = 0; j < V; ++j) v[j] *= value[j];
    }
  }
  template <class Y>
  __device__ __forceinline__ void store(const Vec<T, V>& v, int c) const {
    auto y = narrowed<Y>(v.v);
    store_row(static_cast<Y*>(f_.y), y, c);
  }
  template <class Y>
  __device__ __forceinline__ void store_row(Y* to, Vec<Y, V>& columns, int c) const {
    store_columns(to + m_ * f_.n + c, left(c), columns, aligned());
  }

  const Forward& f_;
  int64_t m_;
  int first_;
  bool aligned_;
  const X* x_;
  int64_t w_;  // elements before its row of the weight
};

// Threads of a multiprocessor that the registers are to leave room for.
template <int kThreads>
constexpr int kGeneralResident = kGeneralBlock<kThreads> < 512 ? 640 / kGeneralBlock<kThreads> : 1;

// Family `registers`. A row is read once, all its loads are issued before the first is used, and an
// exponential is computed once per element.
template <class X, Form kForm, int kThreads, int kItems>
__global__ void __launch_bounds__(kGeneralBlock<kThreads>, kGeneralResident<kThreads>)
    forward_general(Forward f, WeightRows weights, bool aligned) {
  using Row = GeneralForward<X, kForm>;
  using T = Acc<X>;
  constexpr int V = Row::V, kRows = kGeneralBlock<kThreads> / kThreads;
  const int thread = threadIdx.x % kThreads, n = static_cast<int>(f.n);
  const int k = Row::kUsual ? n : static_cast<int>(f.k);
  RowSum<T, kThreads, false> row_sum(1);
  using Number = RowNumber<kForm>;
  const Number rows = static_cast<Number>(f.rows), step = Number{gridDim.x} * kRows;
  for (Number base = Number{blockIdx.x} * kRows; base < rows; base += step) {
    const Number m = base + threadIdx.x / kThreads;
    const bool live = m < rows;
    const Row row(f, live ? m : 0, weights, thread * V, aligned);
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
          sum = squares<Row::kUsual>(v[i], c, k, sum);
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
  using Row = GeneralForward<X, Form::any>;
  using T = Acc<X>;
  constexpr int V = Row::V;
  const int n = static_cast<int>(f.n), k = static_cast<int>(f.k);
  RowSum<T, kGeneralLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < f.rows; m += gridDim.x) {
    const Row row(f, m, weights, threadIdx.x * V, aligned);
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
