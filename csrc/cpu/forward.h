// The forward body: y = x * r * (offset + w) + b, optionally of x + residual, which is then written
// too. In common calls the residual sum is computed (and rounded) twice, once for the statistic and once
// for the write: that costs arithmetic but neither a copy of the row nor a second trip to memory. A gate
// that goes ahead of the norm costs more than a copy (Stash). Rare calls add first, a few rows at a time, and
// have no kernel for it.
#pragma once
#include <cstdint>

#include "../norm.h"
#include "choose.h"
#include "gate.h"
#include "short_rows.h"
#include "sweep.h"

namespace fused_rmsnorm::cpu {
namespace {

constexpr int64_t kAddBytes = 32768;  // of x that are added to their residual before they are normalised

// What is asked of every element of a call, settled before the loops.
struct ForwardOptions {
  bool plain;  // one row of weight, neither offset nor bias. Else the steps look for them
  bool add;    // x + residual; only where plain
  Gate gate;
};

template <class Types, ForwardOptions kOptions>
class ForwardKernel {
 public:
  using X = typename Types::X;
  using W = typename Types::W;
  using Y = typename Types::Y;
  using T = typename Types::T;
  using Out = Y;
  using Second = X;
  static constexpr bool kAdd = kOptions.add, kPlain = kOptions.plain;
  static constexpr Gate kGate = kOptions.gate;
  static constexpr bool kGated = kGate != Gate::none;
  static constexpr bool kOther = kAdd || kGated;  // a second input of x's shape
  static constexpr bool kTwoOutputs = kAdd, kInline = true, kSharesLoads = false;
  static constexpr Nans kNans = kPlain ? Types::kNans : Nans::any;
  static constexpr bool kSettleStream = cpu::kSettleStream<Types, kGate>;
  static constexpr int kStreamLevel = 2;

  // stream: whether y is written past the caches.
  ForwardKernel(const Forward& f, bool stream)
      : f_(f),
        stash_(f.k == f.n && (!stream || starts_on_lines(f.y, f.n, sizeof(Y))), f.n, block()),
        distance_(prefetch_distance(f.x, f.n, sizeof(X), ahead(stream))),
        other_distance_(kOther ? prefetch_distance(kAdd ? f.residual : f.z, f.n, sizeof(X), ahead(stream))
                               : 0) {}

  int64_t stat_columns() const { return f_.k; }
  int64_t columns() const { return f_.n; }
  int block() const { return block_rows(f_.n, sizeof(X)); }
  bool writes() const { return true; }

  // A row before normalisation.
  struct Input {
    const X* x;
    const X* other;  // the residual's row, or the gate's
    [[no_unique_address]] GateOptions<kGated> gate;

    template <class Lanes>
    [[gnu::always_inline]] typename Format<X>::Raw raw(int64_t i, Lanes lanes) const {
      if constexpr (kAdd) {
        return narrow<X>(load<X>(x + i, lanes) + load<X>(other + i, lanes));
      } else {
        return load_raw(x + i, lanes);
      }
    }
    template <class Lanes>
    [[gnu::always_inline]] Pack<T> act(int64_t i, Lanes lanes) const {
      return activate(load<X>(other + i, lanes), gate.sigmoid);
    }
    // What is normalised, of what raw(i) gave: for the statistic, and for the write.
    template <class Lanes>
    [[gnu::always_inline]] Pack<T> first(typename Format<X>::Raw raw, int64_t i, Lanes lanes) const {
      Pack<T> v = Format<X>::widen(raw);
      if constexpr (kGate == Gate::first) {
        v = v * act(i, lanes);
        if (gate.stash) PlainFormat<T>::store(gate.stash + i, v);
      }
      return v;
    }
    template <class Lanes>
    [[gnu::always_inline]] Pack<T> again(typename Format<X>::Raw raw, int64_t i, Lanes lanes) const {
      if constexpr (kGate == Gate::first) {
        return gate.stash ? PlainFormat<T>::load(gate.stash + i) : Format<X>::widen(raw) * act(i, lanes);
      }
      return Format<X>::widen(raw);
    }
  };

  struct Stat {
    Input in, ahead;  // ahead: what to prefetch

    template <class Lanes>
    [[gnu::always_inline]] void step(Pack<T>& sum, int64_t i, Lanes lanes) const {
      const Pack<T> v = in.first(in.raw(i, lanes), i, lanes);
      sum = fma(v, v, sum);
    }
    template <int kLevel, int count>
    [[gnu::always_inline]] void prefetch(int64_t i) const {
      fetch<kLevel, count>(ahead.x + i);
      if constexpr (kOther) fetch<kLevel, count>(ahead.other + i);
    }
  };

  // What is written where there is neither a bias nor a gate.
  [[gnu::always_inline]] static Pack<T> scaled(typename Format<X>::Raw raw, Vec<T> r, Pack<T> w) {
    Pack<T> v = Format<X>::widen(raw) * r;
    if constexpr (Types::kLlama) v = round_to<X>(v);
    return v * w;
  }

  struct Row {
    Input in;
    Vec<T> r;
    const W *weight, *bias;
    Vec<T> offset;
    bool has_offset, weight_only;  // the latter is asked first, beside a gate
    Y* y;
    X* sum;

    bool rounds() const { return kGate == Gate::none ? Types::kLlama : in.gate.llama; }
    Y* out() const { return y; }
    X* second() const { return sum; }
    void skip(int64_t columns) {
      in.x += columns, y += columns;
      if constexpr (kOther) in.other += columns;
      if constexpr (kAdd) sum += columns;
      if (kPlain || weight) weight += columns;
      if (!kPlain && bias) bias += columns;
    }

    struct Value {
      typename Format<X>::Raw x;
      Pack<T> y;
    };
    template <class Lanes>
    [[gnu::always_inline]] Value value(int64_t i, Lanes lanes) const {
      const auto raw = in.raw(i, lanes);
      if constexpr (kPlain && !kGated) return {raw, scaled(raw, r, load<X>(weight + i, lanes))};
      Pack<T> v = in.again(raw, i, lanes) * r;
      if (rounds()) v = round_to<X>(v);
      if (kPlain || weight) {
        Pack<T> w = load<X>(weight + i, lanes);
        if (kPlain || (kGated && weight_only)) {
          v = v * w;
        } else {
          if (has_offset) w = w + Pack<T>{offset, offset};
          v = bias ? fma(v, w, load<X>(bias + i, lanes)) : v * w;
        }
      }
      if constexpr (kGate == Gate::last) {
        if (sizeof(W) == sizeof(X) && rounds()) v = round_to<X>(v);
        v = v * in.act(i, lanes);
      }
      return {raw, v};
    }
    template <class Dest>
    [[gnu::always_inline]] static void store(const Value& v, Dest dest, Y* to, X* to_sum) {
      if constexpr (kAdd) store_raw(to_sum, v.x, dest);
      cpu::store<X, kNans>(to, v.y, dest);
    }
  };

  [[gnu::always_inline]] Stat stat_of(int64_t m) {
    const Input in = input(m);
    return {in, {in.x + distance_, kOther ? in.other + other_distance_ : nullptr, in.gate}};
  }
  [[gnu::always_inline]] Row row_of(int64_t m, int slot) {
    const int64_t w = kPlain ? 0 : weight_row(f_, m) * f_.n;
    return {input(m),
            splat(rstd_[slot]),
            kPlain || f_.weight ? static_cast<const W*>(f_.weight) + w : nullptr,
            !kPlain && f_.bias ? static_cast<const W*>(f_.bias) + w : nullptr,
            splat(static_cast<T>(f_.weight_offset)),
            f_.weight_offset != 0,
            f_.weight_offset == 0 && !f_.bias,
            static_cast<Y*>(f_.y) + m * f_.n,
            kAdd ? static_cast<X*>(f_.sum) + m * f_.n : nullptr};
  }

  // 1 / sqrt(mean + eps) of the sums of some rows.
  [[gnu::always_inline]] static Vec<T> rstd_of(const Forward& f, Vec<T> sums) {
    const Vec<T> k = splat(static_cast<T>(f.k)), eps = splat(upper_nan(static_cast<T>(f.eps)));
    return splat<T>(1) / Native<T>::sqrt(sums / k + eps);
  }
  // Of the rows m ... m + count - 1.
  void finish(int64_t m, int count, const T* sums) {
    constexpr int lanes = kVecBytes / sizeof(T);
    for (int i = 0; i < count; i += lanes) {
      Vec<T> s;
      copy<kVecBytes>(&s, sums + i);
      s = rstd_of(f_, s);
      copy<kVecBytes>(rstd_ + i, &s);
    }
    if (T* const out = static_cast<T*>(f_.rstd)) {
      for (int i = 0; i < count; ++i) out[m + i] = rstd_[i];
    }
  }

 private:
  static int64_t ahead(bool stream) { return stream ? kStreamPrefetchBytes : kPrefetchBytes; }

  [[gnu::always_inline]] Input input(int64_t m) {
    return {row_at<X>(f_.x, m),
            kOther ? row_at<X>(kAdd ? f_.residual : f_.z, m) : nullptr,
            {f_.sigmoid, f_.llama, stash_.row(m)}};
  }

  const Forward& f_;
  Stash<kGate == Gate::first ? 1 : 0> stash_;  // of what is normalised
  const int64_t distance_, other_distance_;
  T rstd_[kMaxBlock] = {};
};

template <class Types, ForwardOptions kOptions>
void forward_rows(const Forward& f, int64_t begin, int64_t end, bool stream) {
  using Kernel = ForwardKernel<Types, kOptions>;
  Kernel kernel(f, stream);
  Sweep<Kernel>::rows(kernel, begin, end, stream);
}

template <class X>
[[gnu::noinline]] void add_rows(const Forward& f, int64_t begin, int64_t end) {
  constexpr int width = Pack<Compute<X>>::width;
  for (int64_t m = begin; m < end; ++m) {
    const X *const x = row_at<X>(f.x, m), *const residual = row_at<X>(f.residual, m);
    X* const sum = static_cast<X*>(f.sum) + m * f.n;
    const auto step = [&](int64_t i, auto lanes) {
      store_raw(sum + i, narrow<X>(load<X>(x + i, lanes) + load<X>(residual + i, lanes)), lanes);
    };
    int64_t i = 0;
    for (; i + width <= f.n; i += width) step(i, Full{});
    if (i < f.n) step(i, Part{static_cast<int>(f.n - i)});
  }
}

inline bool is_plain(const Forward& f) {
  return f.weight && f.weight_rows == 1 && !f.bias && f.weight_offset == 0;
}

// Any call without a gate. A fused add takes two steps for a few rows at a time, which the caches hold.
template <class Types>
void general_forward(const Forward& f, int64_t begin, int64_t end, bool stream) {
  constexpr ForwardOptions kOptions{false, false, Gate::none};
  if (!f.residual.data) return forward_rows<Types, kOptions>(f, begin, end, stream);
  Forward of_sum = f;
  of_sum.x = Rows{f.sum, 1, f.n, 0}, of_sum.residual = Rows{};
  const int64_t fit = kAddBytes / (f.n * size_of(f.x_dtype)), rows = fit < 1 ? 1 : fit;
  for (; begin < end; begin += rows) {
    const int64_t last = end - begin < rows ? end : begin + rows;
    add_rows<typename Types::X>(f, begin, last);
    forward_rows<Types, kOptions>(of_sum, begin, last, stream);
  }
}

template <Gate kGate>
void gated_forward(const Forward& f, int64_t begin, int64_t end, bool stream) {
  visit_gated_types<kGate>(f, [&]<class Types>(Types) {
    if constexpr (kSettled<Types, kGate>) {
      if (is_plain(f)) return forward_rows<Types, ForwardOptions{true, false, kGate}>(f, begin, end, stream);
    }
    forward_rows<Types, ForwardOptions{false, false, kGate}>(f, begin, end, stream);
  });
}

void forward(const Forward& f, int64_t begin, int64_t end, bool stream) {
  if (f.gate == Gate::first) return gated_forward<Gate::first>(f, begin, end, stream);
  if (f.gate == Gate::last) return gated_forward<Gate::last>(f, begin, end, stream);
  const bool plain = is_plain(f);
  visit_types(f, [&]<class Types>(Types) {
    if constexpr (kSettled<Types, Gate::none>) {
      constexpr ForwardOptions kNorm{true, false, Gate::none}, kAdd{true, true, Gate::none};
      if (!stream && has_short_rows(f, end - begin)) {
        return f.residual.data ? short_rows<ForwardKernel<Types, kAdd>>(f, begin, end)
                               : short_rows<ForwardKernel<Types, kNorm>>(f, begin, end);
      }
      if (plain && !f.residual.data) return forward_rows<Types, kNorm>(f, begin, end, stream);
      if (plain) return forward_rows<Types, kAdd>(f, begin, end, stream);
    }
    general_forward<Types>(f, begin, end, stream);
  });
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
