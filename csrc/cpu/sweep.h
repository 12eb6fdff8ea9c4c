// How both directions go over their rows.
//
// A kernel has two halves: a statistic of a whole row (the sum of squares; the dot product of the
// backward, with dw on the side), and a write of the row that needs it. A sweep interleaves the
// write of one row with the statistic of a row some way ahead, so that arithmetic hides behind
// memory. Rows ahead come in blocks of up to 8 KiB, which lets the square roots and the sums across
// lanes of short rows overlap as well.
//
// The lanes of a statistic are fixed by the column alone. Where a write starts is not: every
// element is computed by itself, so a write may start wherever a line of the output starts. That is
// what lets rows of any length stream whole lines past the caches: the line that the end of one row
// shares with the start of the next is put together in a LineStager.
#pragma once
#include <cstdint>

#include "../norm.h"

namespace fused_rmsnorm::cpu {
namespace {

constexpr int kLine = 64;      // bytes of a cache line
constexpr int kMaxBlock = 16;  // most rows that a statistic runs ahead
constexpr int64_t kBlockBytes = 8192;
constexpr int64_t kPrefetchBytes = 2048;
constexpr int64_t kStreamPrefetchBytes = 4096;  // forward, into the second level; up to 15 % faster so
// How far ahead of ordinary stores their lines are fetched: without it, fp32 from memory is 15 to 20 %
// slower, in L2 up to 25 %. 512 to 2048 do the same, and so does a prefetch that asks for ownership.
constexpr int64_t kStoreAheadBytes = 1024;

template <class E>
[[gnu::always_inline]] inline const E* row_at(const Rows& rows, int64_t i) {
  const int64_t offset = rows.inner == 1
                             ? i * rows.outer_stride
                             : (i / rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride;
  return static_cast<const E*>(rows.data) + offset;
}

// Elements from a place in one row to the place to prefetch: `bytes` ahead where rows follow each
// other, else the same column of a row that lies about as far ahead.
inline int64_t prefetch_distance(const Rows& rows, int64_t n, int64_t size, int64_t bytes) {
  const bool packed = rows.inner > 1 && rows.inner_stride == n;
  const int64_t run = packed ? rows.inner * n : n;  // contiguous elements
  const int64_t stride = rows.inner > 1 && !packed ? rows.inner_stride : rows.outer_stride;
  if (stride == run || run * size >= 2 * bytes) return bytes / size;
  return stride * ((bytes + run * size - 1) / (run * size));
}

inline int block_rows(int64_t n, int64_t size) {
  const int64_t rows = kBlockBytes / (n * size);
  return rows < 1 ? 1 : rows > kMaxBlock ? kMaxBlock : static_cast<int>(rows);
}

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
  // Where the next elements go; there is room for a pack more than are pushed.
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
  alignas(kLine) char buffer_[4 * kLine];
  char* line_;  // where the first line of the buffer belongs
  int fill_, lead_;
};

template <bool kStream>
struct StoreKind {
  using type = Full;
};
template <>
struct StoreKind<true> {
  using type = Streamed;
};

template <class K>
struct Outputs {
  LineStager<typename K::Out> first;
  LineStager<typename K::Second> second;  // used if K::kTwoOutputs
};

// The lines of a step's ordinary stores, some way ahead.
template <int bytes>
[[gnu::always_inline]] inline void fetch_ahead(const void* out) {
  for (int b = 0; b < bytes; b += kLine) prefetch<1>(static_cast<const char*>(out) + kStoreAheadBytes + b);
}

// Writes row `write` (its statistic is in `slot`) and returns the statistic of row `ahead`; -1: none.
template <bool kStream, class K>
[[gnu::noinline]] typename K::T sweep(const K& kernel, int64_t write, int slot, int64_t ahead,
                                      Outputs<K>& outputs) {
  using T = typename K::T;
  using Out = typename K::Out;
  using Second = typename K::Second;
  constexpr int width = Pack<T>::width;
  constexpr int pack_bytes = width * sizeof(Out);
  constexpr int packs = 2 * pack_bytes >= kLine ? 2 : 4;  // a step streams whole lines
  constexpr int step = packs * width;

  const auto stat = kernel.stat_of(ahead >= 0 ? ahead : write);
  const auto row = kernel.row_of(write >= 0 ? write : ahead, slot);
  Out* const out = row.out();
  Second* const second = row.second();
  const int64_t stat_n = ahead >= 0 ? kernel.stat_columns() : 0;
  const int64_t write_n = write >= 0 ? kernel.columns() : 0;

  int64_t j = 0;  // column of the write
  if constexpr (kStream) {
    const int64_t gap = write_n ? outputs.first.gap() : 0;
    for (; j < gap; j += width) {
      row.step(j, Full{}, Full{}, outputs.first.at() + j, outputs.second.at() + j);
    }
    if (gap) {
      outputs.first.push(gap);
      if constexpr (K::kTwoOutputs) outputs.second.push(gap);
    }
    j = gap;
  }
  using Dest = typename StoreKind<kStream>::type;
  const auto fetch_outputs = [&](int64_t j) {
    if constexpr (!kStream) {
      fetch_ahead<step * sizeof(Out)>(out + j);
      if constexpr (K::kTwoOutputs) fetch_ahead<step * sizeof(Second)>(second + j);
    }
  };

  Pack<T> sums[2] = {};
  int64_t i = 0;  // column of the statistic
  const int64_t stat_end = stat_n - stat_n % step, write_end = j + (write_n - j) / step * step;
  for (; i < stat_end && j < write_end; i += step, j += step) {
    stat.prefetch(i, step);
    fetch_outputs(j);
#pragma GCC unroll 4
    for (int u = 0; u < packs; ++u) {
      stat.step(sums[u % 2], i + u * width, Full{});
      row.step(j + u * width, Full{}, Dest{}, out + j + u * width, second + j + u * width);
    }
  }
  for (; i < stat_end; i += step) {
    stat.prefetch(i, step);
#pragma GCC unroll 4
    for (int u = 0; u < packs; ++u) stat.step(sums[u % 2], i + u * width, Full{});
  }
  for (; j < write_end; j += step) {
    stat.prefetch(j, step);
    fetch_outputs(j);
#pragma GCC unroll 4
    for (int u = 0; u < packs; ++u) {
      row.step(j + u * width, Full{}, Dest{}, out + j + u * width, second + j + u * width);
    }
  }

  for (int u = 0; i < stat_n; i += width, ++u) {
    const int64_t left = stat_n - i;
    if (left >= width) {
      stat.step(sums[u % 2], i, Full{});
    } else {
      stat.step(sums[u % 2], i, Part{static_cast<int>(left)});
    }
  }

  if constexpr (!kStream) {
    for (; j + width <= write_n; j += width) row.step(j, Full{}, Full{}, out + j, second + j);
    if (j < write_n) {
      const Part rest{static_cast<int>(write_n - j)};
      row.step(j, rest, rest, out + j, second + j);
    }
  } else if (write_n) {
    if constexpr (pack_bytes >= kLine) {
      for (; j + width <= write_n; j += width) row.step(j, Full{}, Streamed{}, out + j, second + j);
    }
    outputs.first.resume(out + j);
    if constexpr (K::kTwoOutputs) outputs.second.resume(second + j);
    const int64_t rest = write_n - j;
    for (int64_t at = 0; at < rest; at += width) {
      Out* const to = outputs.first.at() + at;
      Second* const to2 = outputs.second.at() + at;
      if (rest - at >= width) {
        row.step(j + at, Full{}, Full{}, to, to2);
      } else {
        row.step(j + at, Part{static_cast<int>(rest - at)}, Full{}, to, to2);
      }
    }
    outputs.first.push(rest);
    if constexpr (K::kTwoOutputs) outputs.second.push(rest);
  }
  return sum(Pack<T>{sums[0].a + sums[1].a, sums[0].b + sums[1].b});
}

// All rows of [begin, end).
template <bool kStream, class K>
void sweep_rows(K& kernel, int64_t begin, int64_t end) {
  using T = typename K::T;
  Outputs<K> outputs;
  if (begin >= end) return;
  if (!kernel.writes()) {
    for (int64_t m = begin; m < end; ++m) sweep<kStream>(kernel, -1, 0, m, outputs);
    return;
  }
  if constexpr (kStream) {
    const auto row = kernel.row_of(begin, 0);
    outputs.first.begin(row.out());
    if constexpr (K::kTwoOutputs) outputs.second.begin(row.second());
  }
  const int block = kernel.block();
  T sums[kMaxBlock] = {};
  for (int64_t m = begin; m < end && m < begin + block; ++m) {
    sums[m - begin] = sweep<kStream>(kernel, -1, 0, m, outputs);
  }
  for (int64_t m = begin; m < end; m += block) {
    const int count = static_cast<int>(end - m < block ? end - m : block);
    kernel.finish(m, count, sums);
    for (int slot = 0; slot < count; ++slot) {
      const int64_t ahead = m + block + slot;
      sums[slot] = sweep<kStream>(kernel, m + slot, slot, ahead < end ? ahead : -1, outputs);
    }
  }
  if constexpr (kStream) {
    outputs.first.end();
    if constexpr (K::kTwoOutputs) outputs.second.end();
    fence();
  }
}

}  // namespace
}  // namespace fused_rmsnorm::cpu
