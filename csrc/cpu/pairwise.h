// How the sums of blocks become one number whose error does not grow with their number.
#pragma once
#include <cstdint>

#include "simd.h"

namespace fused_rmsnorm::cpu {
namespace {

// Columns after which the lanes are folded into one number. A lane that went on would lose what is small
// beside it, and stop growing at 2^24 ones. Of a length that rows seldom exceed: shorter ones are one
// block, and pay nothing.
constexpr int64_t kFoldColumns = 4096;

// Sums of blocks, added in pairs, pairs of pairs and so on: the order follows from their number alone,
// and a sum of 2^k blocks has k roundings.
template <class T>
class Pairwise {
 public:
  // Out of line, both: rows of one block, which are most, come to neither.
  [[gnu::noinline]] void add(T v) {
    int level = 0;
    for (; count_ >> level & 1; ++level) v = levels_[level] + v;
    levels_[level] = v;
    ++count_;
  }
  // Of everything added, and the last block.
  [[gnu::always_inline]] T total(T last) const { return count_ ? total_of_blocks(last) : last; }

 private:
  [[gnu::noinline]] T total_of_blocks(T last) const {
    for (int level = 0; count_ >> level; ++level) {
      if (count_ >> level & 1) last = levels_[level] + last;
    }
    return last;
  }

  int64_t count_ = 0;
  T levels_[52];  // 2^52 blocks of 4096 columns: more than there is memory
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
