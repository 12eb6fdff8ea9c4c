// The backward of calls that the kernels of plain rows do not take: with a weight of several rows, or a gate:
//   Gate::last    dy * act(z) in place of dy;   dz = dy * norm(x) * act'(z)
//   Gate::first   x * act(z) in place of x;     dz = dx * x * act'(z), then dx = dx * act(z)
//
// Each row of the weight has blocks of its own, which take its rows in turn and sum its dw and db in
// registers: a partial for each block, added in order by finalize.cuh. As models ask for it (is_usual() of
// rows.h, not of fp64), and without a gate, a row is read once. Else it is read twice, the second time from
// the caches: there are no registers left to keep it in. What the gate's exponential gives is kept in shared
// memory: to compute it again takes several times as many instructions, of fp32 more than the rest of a
// reading.
#pragma once
#include "backward_any.cuh"
#include "gate.cuh"
#include "general.cuh"

namespace fused_rmsnorm::cuda {

// Where a thread of a block keeps act(z) and act'(z) of its columns between its two readings of a row: in
// slots of 16 bytes, beside its neighbours' slots.
template <int V, int kBlock>
class Stash {
 public:
  enum Which { value, slope };

  __device__ explicit Stash(unsigned char* memory) : slots_(reinterpret_cast<uint4*>(memory) + threadIdx.x) {}

  __device__ __forceinline__ void put(int item, Which which, int piece, Vec<float, 4>& numbers) const {
    slot(item, which, piece) = numbers.piece(0);
  }
  __device__ __forceinline__ Vec<float, V> get(int item, Which which) const {
    Vec<float, V> numbers;
#pragma unroll
    for (int i = 0; i < V / 4; ++i) numbers.piece(i) = slot(item, which, i);
    return numbers;
  }

 private:
  __device__ __forceinline__ uint4& slot(int item, Which which, int piece) const {
    return slots_[((item * 2 + which) * (V / 4) + piece) * kBlock];
  }
  uint4* slots_;
};

// One row of such a call. aligned: everything in the call is.
template <class X, Form kForm>
class GeneralBackward {
 public:
  using T = Acc<X>;
  static constexpr int V = 16 / sizeof(X);
  static constexpr bool kUsual = kIsUsual<kForm>;
  // Of a vector of columns: what is normalised, and the gradient of its norm.
  struct Columns {
    Vec<T, V> v;
    T g[V];
    Vec<X, V> z;  // where it is asked for
  };

  // w: the row of the weight. first: the first column that this thread asks for.
  __device__ GeneralBackward(const Backward& b, int64_t m, int64_t w, int first, bool aligned)
      : b_(b), m_(m), w_(w * b.n), first_(kUsual ? first : 0), aligned_(kUsual || aligned) {
    if constexpr (kUsual) {
      x_ = pinned(row_of<X>(b.x, m) + first), dy_ = pinned(row_of<X>(b.dy, m) + first);
      if (gated()) z_ = pinned(row_of<X>(b.z, m) + first);
      w_ += first, out_ = m * b.n + first;
    }
  }

  __device__ __forceinline__ Gate gate() const {
    return kUsual || !kMayBeGated<X> ? kGateOf<kForm> : b_.gate;
  }
  __device__ __forceinline__ bool gated() const { return gate() != Gate::none; }
  // All loads are issued before the first is waited for.
  __device__ __forceinline__ Columns load(int c, bool with_z) const {
    Columns in;
    const auto x = load_x(c);
    if (with_z) in.z = load_z(c);
    load_dy(c, in.g);
    widen(x, in.v.v);
    return in;
  }
  // act(z) and act'(z) of a vector of columns, four numbers at a time: take(piece, values, slopes).
  template <class Take>
  __device__ __forceinline__ void activations(const Vec<X, V>& z, Take take) const {
    T gate[V];
    widen(z, gate);
#pragma unroll
    for (int piece = 0; piece < V / 4; ++piece) {
      Vec<float, 4> value, slope;
      activate<X>({gate[4 * piece], gate[4 * piece + 1], gate[4 * piece + 2], gate[4 * piece + 3]},
                  !kUsual && b_.sigmoid, value.v, slope.v);
      take(piece, value, slope);
    }
  }
  // Multiplies what is normalised, or its gradient, by act(z). keep(piece, values, slopes) gets what was
  // computed for that.
  template <class Keep>
  __device__ __forceinline__ void take_gate(Columns& in, Keep keep) const {
    const bool first = gate() == Gate::first;
    activations(in.z, [&](int piece, Vec<float, 4>& value, Vec<float, 4>& slope) {
#pragma unroll
      for (int j = 0; j < 4; ++j) {
        const int q = 4 * piece + j;
        first ? in.v.v[q] *= value.v[j] : in.g[q] *= value.v[j];
      }
      keep(piece, value, slope);
    });
  }
  __device__ __forceinline__ T dot(const Columns& in, int c, T sum) const {
    T scale[V];
    make_scale(c, scale);
    return dot_of(in.v.v, in.g, scale, sum);
  }

  // Stores dx of a vector of columns without a gate.
  __device__ __forceinline__ void finish(Columns in, int c, T r, T coefficient) const {
    make_dx(in, c, r, coefficient);
    if (b_.dsum.data) add_to_dx(load_row(row_of<X>(b_.dsum, m_) + first_, c), in.g);
    store(b_.dx, c, in.g);
  }
  // x and a dy of x's dtype, as they lie in memory.
  struct Packed {
    Vec<X, V> x, dy;
  };
  __device__ __forceinline__ Packed load_packed(int c) const { return {load_x(c), load_row(dy_, c)}; }
  static __device__ __forceinline__ Columns unpacked(const Packed& packed) {
    Columns in;
    widen(packed.x, in.v.v), widen(packed.dy, in.g);
    return in;
  }
  // Stores dx and dz under one; value() and slope() return act(z) and act'(z), each time they are needed.
  template <class Value, class Slope>
  __device__ __forceinline__ void finish(int c, T r, T coefficient, Value value, Slope slope) const {
    Columns in = load(c, false);
    T dz[V];
    if (gate() == Gate::last) {
      const auto put_dz = [&](bool llama) {
        norm_of(in.v, c, r, llama, dz);
        multiply(dz, in.g), multiply(dz, slope().v);
        store(b_.dz, c, dz);
      };
      if constexpr (kUsual && sizeof(X) < sizeof(T)) {
        settled(b_.llama, [&](auto is_llama) { put_dz(decltype(is_llama)::value); });
      } else {
        put_dz(b_.llama);
      }
      multiply(in.g, value().v);
      make_dx(in, c, r, coefficient);
    } else {
#pragma unroll
      for (int j = 0; j < V; ++j) dz[j] = in.v.v[j];
      multiply(in.v.v, value().v);
      make_dx(in, c, r, coefficient);
      multiply(dz, in.g), multiply(dz, slope().v);
      store(b_.dz, c, dz);
      multiply(in.g, value().v);
    }
    store(b_.dx, c, in.g);
  }
  // The same, where they have not been kept.
  __device__ __forceinline__ void finish_afresh(int c, T r, T coefficient) const {
    Vec<T, V> value, slope;
    activations(load_z(c), [&](int piece, auto& values, auto& slopes) {
      value.piece(piece) = values.piece(0), slope.piece(piece) = slopes.piece(0);
    });
    finish(c, r, coefficient, [&] { return value; }, [&] { return slope; });
  }

 private:
  static __device__ __forceinline__ void multiply(T (&a)[V], const T (&b)[V]) {
#pragma unroll
    for (int j = 0; j < V; ++j) a[j] *= b[j];
  }
  // The gradient of what is normalised, in the place of that of its norm.
  __device__ __forceinline__ void make_dx(Columns& in, int c, T r, T coefficient) const {
    T scale[V];
    make_scale(c, scale);
    dx_in<kUsual>(b_, c, in.v.v, in.g, scale, r, coefficient);
  }
  // What a last gate multiplies.
  __device__ __forceinline__ void norm_of(const Vec<T, V>& v, int c, T r, bool llama, T (&norm)[V]) const {
#pragma unroll
    for (int j = 0; j < V; ++j) norm[j] = v.v[j] * r;
    apply_weight<X, kUsual>(
        b_, llama, norm, [&](T(&scale)[V]) { make_scale(c, scale); },
        [&](T(&bias)[V]) { load_weight(b_.bias, c, bias); });
    if (sizeof(X) < sizeof(T) && llama && !wide()) round_to<X>(norm);
  }

  __device__ __forceinline__ int left(int c) const { return static_cast<int>(b_.n) - c; }
  __device__ __forceinline__ bool aligned() const { return kUsual || aligned_; }
  __device__ __forceinline__ bool wide() const { return b_.w_dtype != b_.x_dtype; }
  __device__ __forceinline__ Vec<X, V> load_row(const X* row, int c) const {
    return load_columns<X, V>(row + (c - first_), left(c), aligned());
  }
  __device__ __forceinline__ Vec<X, V> load_x(int c) const {
    return load_row(kUsual ? x_ : row_of<X>(b_.x, m_), c);
  }
  __device__ __forceinline__ Vec<X, V> load_z(int c) const {
    return load_row(kUsual ? z_ : row_of<X>(b_.z, m_), c);
  }
  __device__ __forceinline__ void load_dy(int c, T (&dy)[V]) const {
    if constexpr (kUsual) return widen(load_row(dy_, c), dy);
    const bool wide = b_.dy_dtype != b_.x_dtype;
    const void* const row = wide ? static_cast<const void*>(row_of<T>(b_.dy, m_)) : row_of<X>(b_.dy, m_);
    load_columns<X>(row, wide, c, left(c), aligned(), dy);
  }
  __device__ __forceinline__ void load_weight(const void* weight, int c, T (&out)[V]) const {
    load_columns<X>(weight_row<X>(weight, wide(), w_), wide(), c - first_, left(c), aligned(), out);
  }
  __device__ __forceinline__ void make_scale(int c, T (&scale)[V]) const {
    if (kUsual && b_.weight_offset == 0) return load_weight(b_.weight, c, scale);
    load_scale(b_.weight, b_.weight_offset, scale, [&](T(&w)[V]) { load_weight(b_.weight, c, w); });
  }
  __device__ __forceinline__ void store(void* to, int c, const T (&from)[V]) const {
    auto out = narrowed<X>(from);
    X* const row = static_cast<X*>(to) + (kUsual ? out_ : m_ * b_.n);
    store_columns(row + (c - first_), left(c), out, aligned());
  }

  const Backward& b_;
  int64_t m_, w_;  // w_: elements before its row of the weight, at first_
  int first_;
  bool aligned_;
  // Of a usual call, where its rows are, at first_; others compute that again where they need it, for want of
  // registers.
  const X *x_, *dy_, *z_;
  int64_t out_;
};

// Families `registers`. parts: blocks of each row of the weight.
template <class X, Form kForm, int kThreads, int kItems>
__global__ void __launch_bounds__(kGeneralBlock<kThreads>, kResidentThreads / kGeneralBlock<kThreads>)
    backward_general(Backward b, WeightRows weights, int parts, bool aligned) {
  using Row = GeneralBackward<X, kForm>;
  using T = Acc<X>;
  using Number = RowNumber<kForm>;
  // kOnce: a row is kept as it lies in memory, and is read once.
  constexpr bool kUsual = Row::kUsual, kOnce = kForm == Form::usual, kMayHaveDb = !kIsUsualGate<kForm>;
  constexpr int V = Row::V, kRows = kGeneralBlock<kThreads> / kThreads;
  const int thread = threadIdx.x % kThreads, n = static_cast<int>(b.n);
  const Number w = blockIdx.x / static_cast<unsigned>(parts), part = blockIdx.x - w * parts;
  const Number rows = quotient(weights.rows, b.rows);  // of this row of the weight
  const Number step = Number(parts) * kRows;
  RowSum<T, kThreads, false> row_sum(1);
  unsigned char* const memory = shared_memory() + kScratchBytes;
  using Kept = Stash<V, kRows * kThreads>;
  [[maybe_unused]] const Kept stash(memory);

  // dw and db of so many rows are summed in registers before they are put away.
  for (Number from = part * kRows; from < rows; from += step * kSpan) {
    const Number last = from + step * kSpan < rows ? from + step * kSpan : rows;
    T dw[kItems][V] = {}, db[kItems][V] = {};
#pragma unroll 1
    for (Number base = from; base < last; base += step) {
      const Number j = base + threadIdx.x / kThreads;
      const bool live = j < last;
      const Number m = weights.member(w, live ? j : 0);
      const Row row(b, m, w, thread * V, aligned);
      const T r = static_cast<const T*>(b.rstd)[m];
      T dot = 0;
      typename Row::Packed packed[kOnce ? kItems : 1];
      if constexpr (kOnce) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * kThreads + thread) * V;
          if (live && c < n) packed[i] = row.load_packed(c);
        }
      }
      if (live) {
#pragma unroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * kThreads + thread) * V;
          if (c >= n) continue;
          typename Row::Columns in;
          if constexpr (kOnce) {
            in = Row::unpacked(packed[i]);
          } else {
            in = row.load(c, row.gated());
            if constexpr (kMayBeGated<X>) {
              if (row.gated()) {
                row.take_gate(in, [&](int piece, auto& value, auto& slope) {
                  stash.put(i, Kept::value, piece, value), stash.put(i, Kept::slope, piece, slope);
                });
              }
            }
          }
          dot = row.dot(in, c, dot);
          if (b.dw) add_to_dw<X>(b, in.v.v, in.g, r, dw[i]);
          if (kMayHaveDb && b.db) {
#pragma unroll
            for (int q = 0; q < V; ++q) db[i][q] += in.g[q];
          }
        }
      }
      dot = row_sum(dot);
      if (live && b.dx) {
        const T coefficient = coefficient_of(b, r, dot);
        // With all that may be asked of eight columns, the registers are too few for several vectors.
        [[maybe_unused]] constexpr int kUnroll = kUsual || V < 8 ? kItems : 1;
#pragma unroll kUnroll
        for (int i = 0; i < kItems; ++i) {
          const int c = (i * kThreads + thread) * V;
          if (c >= n) continue;
          if constexpr (kOnce) {
            row.finish(Row::unpacked(packed[i]), c, r, coefficient);
            continue;
          }
          if constexpr (kMayBeGated<X>) {
            if (row.gated()) {
              const auto value = [&] { return stash.get(i, Kept::value); };
              row.finish(c, r, coefficient, value, [&] { return stash.get(i, Kept::slope); });
              continue;
            }
          }
          row.finish(row.load(c, false), c, r, coefficient);
        }
      }
    }
    T* partials = static_cast<T*>(b.workspace) + int64_t{blockIdx.x} * partial_step(b);
    T* const buffer = reinterpret_cast<T*>(memory);
    const bool more = from != part * kRows;
    if (b.dw) {
      put_partial<kThreads>(dw, partials, more, buffer, n, kThreads, thread);
      partials += int64_t{gridDim.x} * partial_step(b);
    }
    if (kMayHaveDb && b.db) put_partial<kThreads>(db, partials, more, buffer, n, kThreads, thread);
    if (kThreads < 128 && last < rows) __syncthreads();  // the buffer becomes the stash again
  }
}

// Family `two_pass`: dx and dz of rows of any length, a block per row.
template <class X>
__global__ void __launch_bounds__(kGeneralLongThreads, 1)
    backward_general_long(Backward b, WeightRows weights, bool aligned) {
  using Row = GeneralBackward<X, Form::any>;
  using T = Acc<X>;
  constexpr int V = Row::V;
  const int n = static_cast<int>(b.n);
  RowSum<T, kGeneralLongThreads, false> row_sum(1);
  for (int64_t m = blockIdx.x; m < b.rows; m += gridDim.x) {
    const Row row(b, m, weights.of(m), threadIdx.x * V, aligned);
    const T r = static_cast<const T*>(b.rstd)[m];
    Fold<T> dot;
#pragma unroll 1
    for (int c = threadIdx.x * V; c < n; c += kGeneralLongThreads * V) {
      auto in = row.load(c, row.gated());
      if constexpr (kMayBeGated<X>) {
        if (row.gated()) row.take_gate(in, [](int, auto&, auto&) {});
      }
      dot.add(row.dot(in, c, T(0)));
    }
    const T coefficient = coefficient_of(b, r, row_sum(dot.total()));
#pragma unroll 1
    for (int c = threadIdx.x * V; c < n; c += kGeneralLongThreads * V) {
      if constexpr (kMayBeGated<X>) {
        if (row.gated()) {
          row.finish_afresh(c, r, coefficient);
          continue;
        }
      }
      row.finish(row.load(c, false), c, r, coefficient);
    }
  }
}

// Family `two_pass`: dw and db, a thread per vector of columns of every parts-th row of a row of the weight.
template <class X>
__global__ void __launch_bounds__(kColumnThreads)
    backward_general_columns(Backward b, WeightRows weights, int parts, bool aligned) {
  using Row = GeneralBackward<X, Form::any>;
  using T = Acc<X>;
  constexpr int V = Row::V;
  const int n = static_cast<int>(b.n);
  const unsigned tiles = (n + kColumnThreads * V - 1) / (kColumnThreads * V);
  const int64_t place = blockIdx.x / tiles, w = place / parts, rows = quotient(weights.rows, b.rows);
  const int c = static_cast<int>((blockIdx.x - place * tiles) * kColumnThreads + threadIdx.x) * V;
  if (c >= n) return;
  Fold<T, V> dw, db;
#pragma unroll 1
  for (int64_t j = place - w * parts; j < rows; j += parts) {
    const int64_t m = weights.member(w, j);
    const Row row(b, m, w, c, aligned);
    auto in = row.load(c, row.gated());
    if constexpr (kMayBeGated<X>) {
      if (row.gated()) row.take_gate(in, [](int, auto&, auto&) {});
    }
    T terms[V] = {};
    add_to_dw<X>(b, in.v.v, in.g, static_cast<const T*>(b.rstd)[m], terms);
    dw.add(terms), db.add(in.g);
  }
  put_columns(b, place, parts * weights.rows.inner, c, dw, db);
}

}  // namespace fused_rmsnorm::cuda
