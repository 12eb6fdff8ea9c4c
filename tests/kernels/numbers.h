// Numbers for the kernel tests: dtypes as bytes in memory, exact rounding in plain C++, and random
// data. Written apart from the kernels, so that an error in theirs cannot hide in ours.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <limits>
#include <memory>

#include "../../csrc/norm.h"

namespace fused_rmsnorm::test {

struct Precision {
  int digits;  // bits of the significand
  int lowest;  // exponent of the smallest normal number
  double max;
};
inline Precision precision(Dtype d) {
  switch (d) {
    case Dtype::f16:
      return {11, -14, 65504.0};
    case Dtype::bf16:
      return {8, -126, 0x1.fep127};
    case Dtype::f32:
      return {24, -126, 0x1.fffffep127};
    default:
      return {53, -1022, std::numeric_limits<double>::max()};
  }
}

// The distance between neighbours of d around v.
inline double spacing(Dtype d, double v) {
  const Precision p = precision(d);
  const int e = v == 0 || !std::isfinite(v) ? p.lowest : std::max(std::ilogb(v), p.lowest);
  return std::ldexp(1.0, e - p.digits + 1);
}

// v rounded to the nearest number of d, ties to even.
inline double round_to(Dtype d, double v) {
  if (d == Dtype::f64 || !std::isfinite(v) || v == 0) return v;
  const double unit = spacing(d, v);
  const double r = std::nearbyint(v / unit) * unit;
  return std::fabs(r) > precision(d).max ? std::copysign(INFINITY, v) : std::copysign(r, v);
}

inline double from_bits(Dtype d, const void* p) {
  if (d == Dtype::f64) {
    double v;
    std::memcpy(&v, p, 8);
    return v;
  }
  if (d == Dtype::f32) {
    float v;
    std::memcpy(&v, p, 4);
    return v;
  }
  uint16_t bits;
  std::memcpy(&bits, p, 2);
  const bool half = d == Dtype::f16;
  const int digits = half ? 10 : 7, bias = half ? 15 : 127, top = half ? 31 : 255;
  const int exponent = bits >> digits & top, fraction = bits & ((1 << digits) - 1);
  double v;
  if (exponent == top) {
    v = fraction ? NAN : INFINITY;
  } else if (exponent == 0) {
    v = std::ldexp(fraction, 1 - bias - digits);
  } else {
    v = std::ldexp(fraction + (1 << digits), exponent - bias - digits);
  }
  return bits >> 15 ? -v : v;
}

inline void to_bits(Dtype d, double v, void* p) {
  if (d == Dtype::f64) {
    std::memcpy(p, &v, 8);
    return;
  }
  const float f = static_cast<float>(d == Dtype::f32 ? v : round_to(d, v));  // exact, but for f32
  if (d == Dtype::f32) {
    std::memcpy(p, &f, 4);
    return;
  }
  uint32_t w;
  std::memcpy(&w, &f, 4);
  uint16_t bits = static_cast<uint16_t>(w >> 16);  // bf16
  if (d == Dtype::f16) {
    const double a = std::fabs(v = f);
    bits = static_cast<uint16_t>(w >> 16 & 0x8000);
    if (std::isnan(v)) {
      bits |= 0x7e00;
    } else if (std::isinf(v)) {
      bits |= 0x7c00;
    } else if (a < 0x1p-14) {
      bits |= static_cast<uint16_t>(std::ldexp(a, 24));
    } else {
      const int e = std::ilogb(a);
      bits |= static_cast<uint16_t>(((e + 15) << 10) + static_cast<int>(std::ldexp(a, 10 - e)) - 1024);
    }
  }
  std::memcpy(p, &bits, 2);
}

// An array of some dtype that starts `shift` elements past a cache line. What lies before and after
// it is checked: by guard bytes, and behind it by AddressSanitizer where that is on, since the heap
// block then ends where the array does.
class Array {
 public:
  Array() = default;
  Array(Dtype dtype, int64_t count, int64_t shift = 0)
      : dtype_(dtype), count_(count), before_(shift * size_of(dtype)) {
    void* p = nullptr;
    if (posix_memalign(&p, 64, before_ + bytes() + kAfter) != 0) std::abort();
    block_.reset(static_cast<char*>(p));
    std::memset(p, kGuard, before_ + bytes() + kAfter);
  }

  char* data() { return block_.get() + before_; }
  const char* data() const { return block_.get() + before_; }
  Dtype dtype() const { return dtype_; }
  int64_t count() const { return count_; }
  int64_t bytes() const { return count_ * size_of(dtype_); }
  double operator[](int64_t i) const { return from_bits(dtype_, data() + i * size_of(dtype_)); }
  void set(int64_t i, double v) { to_bits(dtype_, v, data() + i * size_of(dtype_)); }
  bool same_bytes(const Array& other) const {
    return count_ == other.count_ && (!count_ || std::memcmp(data(), other.data(), bytes()) == 0);
  }
  bool guards_whole() const {
    for (int64_t i = 0; i < before_; ++i) {
      if (block_[i] != kGuard) return false;
    }
    for (int64_t i = 0; i < kAfter; ++i) {
      if (data()[bytes() + i] != kGuard) return false;
    }
    return true;
  }

 private:
  struct Free {
    void operator()(char* p) const { std::free(p); }
  };
  static constexpr char kGuard = 0x5a;
#if defined(__SANITIZE_ADDRESS__)
  static constexpr int64_t kAfter = 0;
#else
  static constexpr int64_t kAfter = 128;
#endif
  Dtype dtype_ = Dtype::f32;
  int64_t count_ = 0, before_ = 0;
  std::unique_ptr<char[], Free> block_;
};

// A small generator of our own: the same numbers on every machine.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 0x9e3779b97f4a7c15u + 1) {}
  uint64_t bits() {
    state_ ^= state_ << 13;
    state_ ^= state_ >> 7;
    return state_ ^= state_ << 17;
  }
  int64_t below(int64_t n) { return static_cast<int64_t>((bits() >> 11) % n); }
  bool chance(int percent) { return below(100) < percent; }
  double uniform(double low, double high) { return low + (high - low) * (bits() >> 11) * 0x1p-53; }
  void fill(Array& a, double low, double high) {
    for (int64_t i = 0; i < a.count(); ++i) a.set(i, uniform(low, high));
  }

 private:
  uint64_t state_;
};

}  // namespace fused_rmsnorm::test
