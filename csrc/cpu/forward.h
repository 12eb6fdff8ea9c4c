// The forward body: y = x * r * (offset + w) + b, optionally of x + residual, which is then written
// too. The residual sum is computed (and rounded) twice, once for the statistic and once for the
// write: that costs arithmetic but neither a copy of the row nor a second trip to memory.
#pragma once
#include <cstdint>

#include "../norm.h"
#include "sweep.h"

namespace fused_rmsnorm::cpu {
namespace {

template <class X, class W, class Y, bool kLlama, bool kAdd, bool kStream>
class ForwardKernel {
 public:
  using T = Compute<X>;
  using Out = Y;
  using Second = X;
  static constexpr bool kTwoOutputs = kAdd;
  static constexpr int kLevel = kStream ? 2 : 1;
  static constexpr int64_t kAhead = kStream ? kStreamPrefetchBytes : kPrefetchBytes;

  explicit ForwardKernel(const Forward& f)
      : f_(f),
        distance_(prefetch_distance(f.x, f.n, sizeof(X), kAhead)),
        residual_distance_(kAdd ? prefetch_distance(f.residual, f.n, sizeof(X), kAhead) : 0) {}

  int64_t stat_columns() const { return f_.k; }
  int64_t columns() const { return f_.n; }
  int block() const { return block_rows(f_.n, sizeof(X)); }
  bool writes() const { return true; }

  // A row before normalisation.
  struct Input {
    const X *x, *residual;

    template <class Lanes>
    [[gnu::always_inline]] typename Format<X>::Raw raw(int64_t i, Lanes lanes) const {
      if constexpr (kAdd) {
        return Format<X>::narrow(load<X>(x + i, lanes) + load<X>(residual + i, lanes));
      } else {
        return load_raw(x + i, lanes);
      }
    }
  };

  struct Stat {
    Input in;
    int64_t distance, residual_distance;

    template <class Lanes>
    [[gnu::always_inline]] void step(Pack<T>& sum, int64_t i, Lanes lanes) const {
      const Pack<T> v = Format<X>::widen(in.raw(i, lanes));
      sum = fma(v, v, sum);
    }
    [[gnu::always_inline]] void prefetch(int64_t i, int count) const {
      for (int j = 0; j < count; j += kLine / static_cast<int>(sizeof(X))) {
        cpu::prefetch<kLevel>(in.x + i + j + distance);
        if constexpr (kAdd) cpu::prefetch<kLevel>(in.residual + i + j + residual_distance);
      }
    }
  };

  struct Row {
    Input in;
    Vec<T> r;
    const W *weight, *bias;
    Vec<T> offset;
    bool has_offset;
    Y* y;
    X* sum;

    Y* out() const { return y; }
    X* second() const { return sum; }

    template <class Lanes, class Dest>
    [[gnu::always_inline]] void step(int64_t i, Lanes lanes, Dest dest, Y* to, X* to_sum) const {
      const auto raw = in.raw(i, lanes);
      Pack<T> v = Format<X>::widen(raw) * r;
      if constexpr (kAdd) store_raw(to_sum, raw, dest);
      if constexpr (kLlama) v = round_to<X>(v);
      if (weight) {
        Pack<T> w = load<X>(weight + i, lanes);
        if (has_offset) w = w + Pack<T>{offset, offset};
        v = bias ? fma(v, w, load<X>(bias + i, lanes)) : v * w;
      }
      store<X>(to, v, dest);
    }
  };

  Stat stat_of(int64_t m) const { return {input(m), distance_, residual_distance_}; }
  Row row_of(int64_t m, int slot) const {
    return {input(m),
            splat(rstd_[slot]),
            static_cast<const W*>(f_.weight),
            static_cast<const W*>(f_.bias),
            splat(static_cast<T>(f_.weight_offset)),
            f_.weight_offset != 0,
            static_cast<Y*>(f_.y) + m * f_.n,
            kAdd ? static_cast<X*>(f_.sum) + m * f_.n : nullptr};
  }

  // 1 / sqrt(mean + eps) of the rows m ... m + count - 1.
  void finish(int64_t m, int count, const T* sums) {
    constexpr int lanes = kVecBytes / sizeof(T);
    const Vec<T> k = splat(static_cast<T>(f_.k)), eps = splat(static_cast<T>(f_.eps));
    for (int i = 0; i < count; i += lanes) {
      Vec<T> s;
      copy<kVecBytes>(&s, sums + i);
      s = splat<T>(1) / Native<T>::sqrt(s / k + eps);
      copy<kVecBytes>(rstd_ + i, &s);
    }
    if (T* const out = static_cast<T*>(f_.rstd)) {
      for (int i = 0; i < count; ++i) out[m + i] = rstd_[i];
    }
  }

 private:
  Input input(int64_t m) const { return {row_at<X>(f_.x, m), kAdd ? row_at<X>(f_.residual, m) : nullptr}; }

  const Forward& f_;
  const int64_t distance_, residual_distance_;
  T rstd_[kMaxBlock] = {};
};

template <class X, class W, class Y, bool kLlama, bool kAdd>
void forward_rows(const Forward& f, int64_t begin, int64_t end, bool stream) {
  if constexpr (!kAdd || sizeof(X) == sizeof(Y)) {  // two outputs stream only line by line together
    if (stream) {
      ForwardKernel<X, W, Y, kLlama, kAdd, true> kernel(f);
      return sweep_rows<true>(kernel, begin, end);
    }
  }
  ForwardKernel<X, W, Y, kLlama, kAdd, false> kernel(f);
  sweep_rows<false>(kernel, begin, end);
}

template <class X, class W, class Y, bool kLlama>
void forward_as(const Forward& f, int64_t begin, int64_t end, bool stream) {
  const auto run =
      f.residual.data ? forward_rows<X, W, Y, kLlama, true> : forward_rows<X, W, Y, kLlama, false>;
  run(f, begin, end, stream);
}

template <class X>
void forward_half(const Forward& f, int64_t begin, int64_t end, bool stream) {
  const bool wide = f.w_dtype == Dtype::f32;
  const auto run = f.llama ? (wide ? forward_as<X, float, float, true> : forward_as<X, X, X, true>)
                           : (wide ? forward_as<X, float, X, false> : forward_as<X, X, X, false>);
  run(f, begin, end, stream);
}

void forward(const Forward& f, int64_t begin, int64_t end, bool stream) {
  switch (f.x_dtype) {
    case Dtype::f32:
      return forward_as<float, float, float, false>(f, begin, end, stream);
    case Dtype::f64:
      return forward_as<double, double, double, false>(f, begin, end, stream);
    case Dtype::f16:
      return forward_half<f16>(f, begin, end, stream);
    case Dtype::bf16:
      return forward_half<bf16>(f, begin, end, stream);
  }
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
