// Whole lines to an output whose rows do not start on a line.
#pragma once
#include <cstdint>

#include "simd.h"

namespace fused_rmsnorm::cpu {
namespace {

constexpr int kLine = 64;  // bytes of a cache line

// Elements on their way to an output whose rows do not start on a line. Whole lines go out past
// the caches, each exactly once; mixing ordinary stores into such lines costs half the bandwidth.
template <class E>
class LineStager {
 public:
  void begin(E* p) {
    fill_ = lead_ = static_cast<int>(reinterpret_cast<uintptr_t>(p) % kLine);
    line_ = reinterpret_cast<char*>(p) - fill_;
  }
  // Elements missing in the line begun; 0 when none is.
  int64_t gap() const { return fill_ ? (kLine - fill_) / static_cast<int>(sizeof(E)) : 0; }
  // Where the next elements go, up to a line of them before they are pushed.
  E* at() { return reinterpret_cast<E*>(buffer_ + fill_); }
  void push(int64_t elements) {
    fill_ += static_cast<int>(elements * sizeof(E));
    if (fill_ < kLine) return;
    if (lead_) {  // the bytes before the first row belong to someone else
      copy_some<kLine>(line_ + lead_, buffer_ + lead_, kLine - lead_);
      lead_ = 0;
    } else {
      for (int i = 0; i < kLine; i += kVecBytes) {
        Vec<float> v;
        copy<kVecBytes>(&v, buffer_ + i);
        stream(line_ + i, v);
      }
    }
    copy<kLine>(buffer_, buffer_ + kLine);
    line_ += kLine;
    fill_ -= kLine;
  }
  // Called with no line begun: elements from here on are pushed again.
  void resume(E* p) { line_ = reinterpret_cast<char*>(p); }
  void end() {
    if (fill_ > lead_) copy_some<kLine>(line_ + lead_, buffer_ + lead_, fill_ - lead_);
  }

 private:
  alignas(kLine) char buffer_[2 * kLine];
  char* line_;  // where the first line of the buffer belongs
  int fill_, lead_;
};

// One stager per output of a kernel K; the second is used if K::kTwoOutputs.
template <class K>
struct Outputs {
  LineStager<typename K::Out> first;
  LineStager<typename K::Second> second;

  template <class Row>
  void begin(const Row& row) {
    first.begin(row.out());
    if constexpr (K::kTwoOutputs) second.begin(row.second());
  }
  void push(int64_t elements) {
    first.push(elements);
    if constexpr (K::kTwoOutputs) second.push(elements);
  }
  template <class Row>
  void resume(const Row& row, int64_t column) {
    first.resume(row.out() + column);
    if constexpr (K::kTwoOutputs) second.resume(row.second() + column);
  }
  void end() {
    first.end();
    if constexpr (K::kTwoOutputs) second.end();
    fence();
  }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
