// The backward body, in the two halves that sweep.h interleaves:
//   statistic   dot = sum(dy * w' * x), and on the way dw += dy * x * r and db += dy   (w' = offset + w)
//   write       dx = r * (dy * w' - [j < k] * x * c) + dsum,   c = r * (r * dot / k)
// dw belongs to the statistic because rstd is known beforehand and its columns must not move, while
// the write starts wherever a line of dx does. c holds r squared only: r cubed leaves fp32's range
// for rows near 1e-13, whose dx is still an ordinary number.
//
// Under a gate the write has a second output, and the statistic stashes activations for it (Stash):
//   Gate::last    dy * act(z) in place of dy;   dz = dy * norm(x) * act'(z)
//   Gate::first   x * act(z) in place of x;     dz = dx * x * act'(z), then dx = dx * act(z)
//
// dw and db are summed in fp32 per chunk of rows, each chunk in its own partial in the workspace
// and in the lane order of x's packs; merge adds the partials in chunk order and puts the lanes
// back. Which thread does what changes nothing. Of a weight of several rows see Chunks in kernels.h.
#pragma once
#include <cstdint>

#include "../norm.h"
#include "choose.h"
#include "gate.h"
#include "kernels.h"
#include "sweep.h"

namespace fused_rmsnorm::cpu {
namespace {

// What is asked of every element of a call, settled before the loops.
struct BackwardOptions {
  // dx of all columns (k = n) is wanted, under one row of weight without an offset or, beside a gate, a
  // bias; db is not. Else the steps look for each of these, and for dw and dsum: beside a gate that is 30
  // to 40 % more instructions.
  bool plain = false;
  bool dw = false, dsum = false;  // only where plain
  Gate gate;
  bool stash = false;  // the statistic keeps its activations for the write (Stash); only where plain
};

template <class Types, BackwardOptions kOptions>
class BackwardKernel {
 public:
  using X = typename Types::X;
  using W = typename Types::W;
  using D = typename Types::Y;  // dy has y's dtype
  using T = typename Types::T;
  using Out = X;
  using Second = X;
  static constexpr Gate kGate = kOptions.gate;
  static constexpr bool kPlain = kOptions.plain, kGated = kGate != Gate::none, kTwoOutputs = kGated;
  // Beside a loop over rows, the pointers of a step do not fit into the registers.
  static constexpr bool kInline = false;
  // A weight that has to be widened is read and widened once for both halves. Of fp32, which needs no
  // instruction to be read, that would be two more.
  static constexpr bool kSharesLoads = sizeof(W) < sizeof(T);
  static constexpr Nans kNans = kPlain ? Types::kNans : Nans::any;
  static constexpr bool kSettleStream = cpu::kSettleStream<Types, kGate>;
  static constexpr int kStreamLevel = 1;
  using Activations = Stash<kGated ? 2 : 0>;  // and their slopes

  // stride: from one row of a partial of dw and db to the next; 0 where it has one.
  // stream: whether dx is written past the caches.
  BackwardKernel(const Backward& b, T* dw, T* db, int64_t stride, bool stream)
      : b_(b),
        dw_(dw),
        db_(db),
        stride_(stride),
        stash_(stashes(b, stream), b.n, block()),
        x_distance_(prefetch_distance(b.x, b.n, sizeof(X), kPrefetchBytes)),
        dy_distance_(prefetch_distance(b.dy, b.n, sizeof(D), kPrefetchBytes)),
        z_distance_(kGated ? prefetch_distance(b.z, b.n, sizeof(X), kPrefetchBytes) : 0) {}

  int64_t stat_columns() const { return b_.n; }
  int64_t columns() const { return b_.n; }
  int block() const { return block_rows(b_.n, sizeof(X)); }
  bool writes() const { return kPlain || b_.dx; }
  // Whether a call's activations are kept: with a gate, where the write begins its packs as the statistic
  // does.
  static bool stashes(const Backward& b, bool stream) {
    return b.dx && (!stream || starts_on_lines(b.dx, b.n, sizeof(X))) &&
           Activations::fits(b.n, block_rows(b.n, sizeof(X)));
  }

  static bool has_stash(const GateOptions<kGated>& gate) {
    return kPlain ? kOptions.stash : gate.stash != nullptr;
  }

  struct Weight {
    const W* data;
    Vec<T> offset;
    bool has_offset;

    explicit operator bool() const { return kPlain || data; }
    template <class Lanes>
    [[gnu::always_inline]] Pack<T> operator()(int64_t i, Lanes lanes) const {
      Pack<T> w = load<X>(data + i, lanes);
      if (!kPlain && has_offset) w = w + Pack<T>{offset, offset};
      return w;
    }
  };

  struct Stat {
    const D *dy, *dy_ahead;  // ahead: what to prefetch
    const X *x, *x_ahead, *z, *z_ahead;
    [[no_unique_address]] GateOptions<kGated> gate;
    Weight weight;
    Vec<T> r;
    T *dw, *db;
    bool dot;

    bool rounds() const { return kGated ? gate.llama : Types::kLlama; }
    bool wants_dot() const { return kPlain || dot; }
    bool wants_dw() const { return kPlain ? kOptions.dw : dw != nullptr; }
    bool wants_db() const { return !kPlain && db; }

    template <class Lanes>
    [[gnu::always_inline]] Pack<T> act(int64_t i, Lanes lanes) const {
      const Pack<T> at = load<X>(z + i, lanes);
      if (!has_stash(gate)) return activate(at, gate.sigmoid);
      const Activation both = activate_with_slope(at, gate.sigmoid);
      PlainFormat<T>::store(gate.stash + i, both.value);
      PlainFormat<T>::store(gate.stash + kStashPlane + i, both.slope);
      return both.value;
    }
    template <class Lanes>
    [[gnu::always_inline]] void step(Pack<T>& sum, int64_t i, Lanes lanes) const {
      Pack<T> g = load<X>(dy + i, lanes);
      if constexpr (kGate == Gate::last) g = g * act(i, lanes);
      if (wants_dot() || wants_dw()) {
        Pack<T> v = load<X>(x + i, lanes);
        if constexpr (kGate == Gate::first) v = v * act(i, lanes);
        const Pack<T> product = g * v;
        if (wants_dot()) sum = weight ? fma(product, weight(i, lanes), sum) : sum + product;
        if (wants_dw()) {
          const Pack<T> before = PlainFormat<T>::load(dw + i);
          PlainFormat<T>::store(dw + i,
                                rounds() ? fma(g, round_to<X>(v * r), before) : fma(product, r, before));
        }
      }
      if (wants_db()) PlainFormat<T>::store(db + i, PlainFormat<T>::load(db + i) + g);
    }
    template <int kLevel, int count>
    [[gnu::always_inline]] void prefetch(int64_t i) const {
      fetch<kLevel, count>(x_ahead + i);
      fetch<kLevel, count>(dy_ahead + i);
      if constexpr (kGated) fetch<kLevel, count>(z_ahead + i);
    }
  };

  struct Row {
    const D* dy;
    const X *x, *dsum, *z;
    [[no_unique_address]] GateOptions<kGated> gate;
    Weight weight;
    const W* bias;
    Vec<T> r, minus_c;
    int64_t k;
    X *dx, *dz;

    X* out() const { return dx; }
    X* second() const { return dz; }
    bool has_dsum() const { return kPlain ? kOptions.dsum : dsum != nullptr; }
    bool has_bias() const { return !kPlain && bias; }
    void skip(int64_t columns) {
      dy += columns, x += columns, dx += columns, k -= columns;
      if (weight) weight.data += columns;
      if (has_dsum()) dsum += columns;
      if constexpr (kGated) {
        z += columns, dz += columns;
        if (has_bias()) bias += columns;
      }
    }

    // dx of a norm of rows v under the gradient g.
    template <class Lanes>
    [[gnu::always_inline]] Pack<T> dx_of(Pack<T> g, Pack<T> v, int64_t i, Lanes lanes) const {
      if (weight) g = g * weight(i, lanes);
      if (kPlain || i < k) {
        const Pack<T> t = fma(v, minus_c, g);
        g = kPlain || i + Pack<T>::width <= k ? t : choose_first<X>(k - i, t, g);
      }
      return has_dsum() ? fma(g, r, load<X>(dsum + i, lanes)) : g * r;
    }
    // What a last gate multiplies.
    template <class Lanes>
    [[gnu::always_inline]] Pack<T> norm_of(Pack<T> v, int64_t i, Lanes lanes) const {
      v = v * r;
      if (gate.llama) v = round_to<X>(v);
      if (weight) {
        v = has_bias() ? fma(v, weight(i, lanes), load<X>(bias + i, lanes)) : v * weight(i, lanes);
      }
      if (sizeof(W) == sizeof(X) && gate.llama) v = round_to<X>(v);
      return v;
    }

    template <class Lanes>
    [[gnu::always_inline]] Activation activation(int64_t i, Lanes lanes) const {
      if (!has_stash(gate)) return activate_with_slope(load<X>(z + i, lanes), gate.sigmoid);
      return {PlainFormat<T>::load(gate.stash + i), PlainFormat<T>::load(gate.stash + kStashPlane + i)};
    }

    struct Value {
      Pack<T> dx, dz;
    };
    template <class Lanes>
    [[gnu::always_inline]] Value value(int64_t i, Lanes lanes) const {
      const Pack<T> g = load<X>(dy + i, lanes), v = load<X>(x + i, lanes);
      if constexpr (kGated) {
        const Activation act = activation(i, lanes);
        if constexpr (kGate == Gate::last) {
          return {dx_of(g * act.value, v, i, lanes), g * norm_of(v, i, lanes) * act.slope};
        } else {
          const Pack<T> d = dx_of(g, v * act.value, i, lanes);
          return {d * act.value, d * v * act.slope};
        }
      } else {
        return {dx_of(g, v, i, lanes), Pack<T>{}};
      }
    }
    template <class Dest>
    [[gnu::always_inline]] void store(const Value& v, Dest dest, X* to, X* to_dz) const {
      cpu::store<X, kNans>(to, v.dx, dest);
      if constexpr (kGated) cpu::store<X, kNans>(to_dz, v.dz, dest);
    }
  };

  Stat stat_of(int64_t m) {
    const D* const dy = row_at<D>(b_.dy, m);
    const X* const x = row_at<X>(b_.x, m);
    const X* const z = kGated ? row_at<X>(b_.z, m) : nullptr;
    const int64_t w = kPlain ? 0 : weight_row(b_, m), at = kPlain ? 0 : w * stride_;
    return {dy,
            dy + dy_distance_,
            x,
            x + x_distance_,
            z,
            kGated ? z + z_distance_ : nullptr,
            {b_.sigmoid, b_.llama, stash_.row(m)},
            weight(w),
            splat(rstd(m)),
            kPlain || dw_ ? dw_ + at : nullptr,
            !kPlain && db_ ? db_ + at : nullptr,
            writes()};
  }
  Row row_of(int64_t m, int slot) {
    const int64_t w = kPlain ? 0 : weight_row(b_, m);
    return {row_at<D>(b_.dy, m),
            row_at<X>(b_.x, m),
            b_.dsum.data ? row_at<X>(b_.dsum, m) : nullptr,
            kGated ? row_at<X>(b_.z, m) : nullptr,
            {b_.sigmoid, b_.llama, stash_.row(m)},
            weight(w),
            kGated && b_.bias ? static_cast<const W*>(b_.bias) + w * b_.n : nullptr,
            splat(rstd(m)),
            splat(-c_[slot]),
            b_.k,
            static_cast<X*>(b_.dx) + m * b_.n,
            kGated ? static_cast<X*>(b_.dz) + m * b_.n : nullptr};
  }

  void finish(int64_t m, int count, const T* sums) {
    for (int i = 0; i < count; ++i) {
      const T r = rstd(m + i);
      c_[i] = r * (r * sums[i] / static_cast<T>(b_.k));
    }
  }

 private:
  T rstd(int64_t m) const { return upper_nan(static_cast<const T*>(b_.rstd)[m]); }
  Weight weight(int64_t row) const {
    const W* const first = static_cast<const W*>(b_.weight);
    return {kPlain || first ? first + row * b_.n : nullptr, splat(static_cast<T>(b_.weight_offset)),
            b_.weight_offset != 0};
  }

  const Backward& b_;
  T *const dw_, *const db_;
  const int64_t stride_;
  Activations stash_;
  const int64_t x_distance_, dy_distance_, z_distance_;
  T c_[kMaxBlock] = {};
};

// One chunk: its rows, its partials of dw and db (nullptr: not wanted), and from row to row of these.
template <class Types, BackwardOptions kOptions>
void backward_rows(const Backward& b, int64_t first, int64_t last, typename Types::T* dw,
                   typename Types::T* db, int64_t stride, bool stream) {
  using Kernel = BackwardKernel<Types, kOptions>;
  Kernel kernel(b, dw, db, stride, stream);
  Sweep<Kernel>::rows(kernel, first, last, stream);
}

// Apart from its callers, or it would become a memset, whose rep stosb is slow to start.
template <class T>
[[gnu::noipa]] void fill(T* p, int64_t count, T value) {
  for (int64_t i = 0; i < count; ++i) p[i] = value;
}

inline int64_t first_row(const Backward& b, const Chunks& plan, int64_t run) {
  if (plan.runs == 1) return 0;
  const int64_t turns = plan.runs / b.weight_rows;
  return (run % turns * b.weight_rows + run / turns) * b.weight_share;
}

template <class Types, Gate kGate>
void backward_chunks(const Backward& b, const Chunks& plan, int64_t begin, int64_t end, bool stream) {
  using T = typename Types::T;
  using Run = void (*)(const Backward&, int64_t, int64_t, T*, T*, int64_t, bool);
  Run run = backward_rows<Types, BackwardOptions{.gate = kGate}>;
  const bool plain = b.dx && b.weight && b.weight_rows == 1 && b.weight_offset == 0 && b.k == b.n && !b.db &&
                     (kGate == Gate::none || !b.bias);
  if constexpr (kSettled<Types, kGate>) {
    constexpr BackwardOptions kPlain{.plain = true, .dw = true, .gate = kGate};
    if (plain && b.dw && !b.dsum.data) run = backward_rows<Types, kPlain>;
    if constexpr (kGate == Gate::none) {
      if (plain && b.dw && b.dsum.data)
        run = backward_rows<Types, BackwardOptions{.plain = true, .dw = true, .dsum = true, .gate = kGate}>;
      if (plain && !b.dw && !b.dsum.data)
        run = backward_rows<Types, BackwardOptions{.plain = true, .gate = kGate}>;
    } else if (plain && b.dw && BackwardKernel<Types, kPlain>::stashes(b, stream)) {
      run = backward_rows<Types, BackwardOptions{.plain = true, .dw = true, .gate = kGate, .stash = true}>;
    }
  }
  for (int64_t c = begin; c < end; ++c) {
    T* const partial = static_cast<T*>(b.workspace) + c * plan.per_chunk;
    const int64_t size = plan.rows_per_partial * plan.stride;
    T* const dw = b.dw ? partial : nullptr;
    T* const db = b.db ? partial + (b.dw ? size : 0) : nullptr;
    // The sums start from what leaves the first row's numbers as they are, signs of zeros included: dy is
    // added to -0, and x * dy * r, by an fma, to +0.
    if (dw) fill(dw, size, T{0});
    if (db) fill(db, size, -T{0});
    const int64_t start = first_row(b, plan, c / plan.count), end_of_run = start + plan.rows_per_run;
    const int64_t first = start + c % plan.count * plan.rows_per_chunk;
    const int64_t last = first + plan.rows_per_chunk;
    run(b, first, last < end_of_run ? last : end_of_run, dw, db, plan.rows_per_partial > 1 ? plan.stride : 0,
        stream);
  }
}

// The chunks' partial sums of a pack of columns, in an order that their number decides: up to
// kMaxInTurn one after the other, then such blocks in pairs, so that the error does not grow with the rows.
constexpr int64_t kMaxInTurn = 128;
template <class T>
Pack<T> add_partials(const T* first, int64_t count, int64_t per_chunk) {
  if (count > kMaxInTurn) {
    int64_t half = kMaxInTurn;
    while (2 * half < count) half *= 2;
    return add_partials(first, half, per_chunk) +
           add_partials(first + half * per_chunk, count - half, per_chunk);
  }
  Pack<T> sum = PlainFormat<T>::load(first);
  for (int64_t c = 1; c < count; ++c) sum = sum + PlainFormat<T>::load(first + c * per_chunk);
  return sum;
}

// Columns [begin, end) of one gradient. A pack that two callers share is computed by both, and each
// writes its own elements of it.
template <class X, class W>
void merge_columns(W* out, const Compute<X>* partials, const Chunks& chunks, int64_t begin, int64_t end) {
  constexpr int width = Pack<Compute<X>>::width;
  for (int64_t i = begin - begin % width; i < end; i += width) {
    const auto sum = add_partials(partials + i, chunks.partials, chunks.per_chunk);
    if (i >= begin && i + width <= end) {
      store<X, Nans::any>(out + i, sum, Full{});
    } else {
      W whole[width];
      store<X, Nans::any>(whole, sum, Full{});
      for (int j = 0; j < width; ++j) {
        if (i + j >= begin && i + j < end) out[i + j] = whole[j];
      }
    }
  }
}

// Columns [begin, end) of all rows of one gradient, whose partials begin at `partials`.
template <class X, class W>
void merge_rows(const Backward& b, W* out, const Compute<X>* partials, const Chunks& plan, int64_t begin,
                int64_t end) {
  for (int64_t row = begin / b.n, at = row * b.n; at < end; ++row, at += b.n) {
    const int64_t first = begin > at ? begin - at : 0, last = end - at < b.n ? end - at : b.n;
    const int64_t place =
        plan.rows_per_partial > 1 ? row * plan.stride : row * plan.partials * plan.per_chunk;
    merge_columns<X>(out + at, partials + place, plan, first, last);
  }
}

template <Gate kGate>
void gated_backward(const Backward& b, const Chunks& plan, int64_t begin, int64_t end, bool stream) {
  visit_gated_types<kGate>(
      b, [&]<class Types>(Types) { backward_chunks<Types, kGate>(b, plan, begin, end, stream); });
}

void backward(const Backward& b, const Chunks& plan, int64_t begin, int64_t end, bool stream) {
  if (b.gate == Gate::first) return gated_backward<Gate::first>(b, plan, begin, end, stream);
  if (b.gate == Gate::last) return gated_backward<Gate::last>(b, plan, begin, end, stream);
  visit_types(b,
              [&]<class Types>(Types) { backward_chunks<Types, Gate::none>(b, plan, begin, end, stream); });
}

void merge(const Backward& b, const Chunks& plan, int64_t begin, int64_t end) {
  visit_types(b, [&]<class Types>(Types) {
    using X = typename Types::X;
    using W = typename Types::W;
    const auto* const partials = static_cast<const typename Types::T*>(b.workspace);
    const int64_t after_dw = b.dw ? plan.rows_per_partial * plan.stride : 0;
    if (b.dw) merge_rows<X>(b, static_cast<W*>(b.dw), partials, plan, begin, end);
    if (b.db) merge_rows<X>(b, static_cast<W*>(b.db), partials + after_dw, plan, begin, end);
  });
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
