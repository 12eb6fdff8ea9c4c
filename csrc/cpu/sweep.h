// How both directions go over their rows.
//
// A kernel has two halves: a statistic of a whole row (the sum of squares; the dot product of the
// backward, with dw on the side), and a write of the row that needs it. A sweep interleaves the
// write of one row with the statistic of a row some way ahead, so that arithmetic hides behind
// memory. Rows ahead come in blocks of up to 8 KiB, which lets the square roots and the sums across
// lanes of short rows overlap as well.
//
// The lanes of a statistic are fixed by the column alone, and so is where they are folded. Where a
// write starts is not: every element is computed by itself, so a write may start wherever a line of
// the output starts. That is what lets rows of any length stream whole lines past the caches: the
// line that the end of one row shares with the start of the next is put together in a LineStager.
#pragma once
#include <cstdint>

#include "../norm.h"
#include "pairwise.h"
#include "stager.h"

namespace fused_rmsnorm::cpu {
namespace {

constexpr int kMaxBlock = 16;  // most rows that a statistic runs ahead
constexpr int64_t kBlockBytes = 8192;
constexpr int64_t kPrefetchBytes = 2048;
constexpr int64_t kStreamPrefetchBytes = 4096;  // forward, into the second level; up to 15 % faster so
// How far ahead of ordinary stores their lines are fetched: without it, fp32 from memory is 15 to 20 %
// slower, in L2 up to 25 %. 512 to 2048 do the same, and so does a prefetch that asks for ownership.
constexpr int64_t kStoreAheadBytes = 1024;
// Packs of a step that are written out in its code; where time goes into conversions, that gains nothing.
constexpr int kUnroll = kSettleCommonCalls ? 4 : 1;

template <class E>
[[gnu::always_inline]] inline const E* row_at(const Rows& rows, int64_t i) {
  const int64_t offset = rows.inner == 1
                             ? i * rows.outer_stride
                             : (i / rows.inner) * rows.outer_stride + (i % rows.inner) * rows.inner_stride;
  return static_cast<const E*>(rows.data) + offset;
}

// The row of the weight that row i of a call takes.
template <class Call>
[[gnu::always_inline]] inline int64_t weight_row(const Call& call, int64_t i) {
  return call.weight_rows == 1 ? 0 : i / call.weight_share % call.weight_rows;
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

// Fetches the lines that `elements` from p on lie in.
template <int kLevel, int elements, class E>
[[gnu::always_inline]] inline void fetch(const E* p) {
  for (int j = 0; j < elements; j += kLine / static_cast<int>(sizeof(E))) prefetch<kLevel>(p + j);
}

// Whether each row of an output begins with a line.
inline bool starts_on_lines(const void* out, int64_t n, int64_t size) {
  return reinterpret_cast<uintptr_t>(out) % kLine == 0 && n * size % kLine == 0;
}

inline int block_rows(int64_t n, int64_t size) {
  const int64_t rows = kBlockBytes / (n * size);
  return rows < 1 ? 1 : rows > kMaxBlock ? kMaxBlock : static_cast<int>(rows);
}

// Whether a sweep writes past the caches: settled before the loops, or asked for every pack.
template <bool kValue>
struct Settled {
  static constexpr bool value = kValue;
};
struct Asked {
  bool value;
};
template <class Stream>
constexpr bool kSureToStream = false;
template <>
constexpr bool kSureToStream<Settled<true>> = true;

// Goes over rows. The loops have one counter, the column: what a kernel adds to it are pointers, which
// start where the step's row does. What is done once per row is a third of the work in one of 128 elements,
// so the forward's turns are inlined into the loop over rows.
template <class K>
class Sweep {
 public:
  using T = typename K::T;

  // All rows of [begin, end).
  static void rows(K& kernel, int64_t begin, int64_t end, bool stream) {
    if (!kernel.writes()) {
      for (int64_t m = begin; m < end; ++m) statistic(kernel, m);
    } else if (begin < end) {
      if constexpr (!K::kSettleStream) {
        write_rows(kernel, begin, end, Asked{stream});
      } else if (stream) {
        write_rows(kernel, begin, end, Settled<true>{});
      } else {
        write_rows(kernel, begin, end, Settled<false>{});
      }
    }
  }

 private:
  using Out = typename K::Out;
  using Second = typename K::Second;
  static constexpr int kWidth = Pack<T>::width;
  static constexpr int kPackBytes = kWidth * sizeof(Out), kLineElements = kLine / sizeof(Out);
  // A step streams whole lines. Of common calls it has more packs, so that a step's own instructions are
  // shared by more elements; more code to compile, though.
  static constexpr int kLeast = 2 * kPackBytes >= kLine ? 2 : kLine / kPackBytes;
  static constexpr int kPacks = K::kPlain && kWidth * sizeof(T) < 2 * kLine ? 4 : kLeast;
  static constexpr int kStep = kPacks * kWidth, kSmallStep = kLeast * kWidth;
  static_assert(kSmallStep * sizeof(Out) % kLine == 0 && kStep % kSmallStep == 0 &&
                kFoldColumns % kStep == 0);
  // Two outputs stream only line by line together.
  static_assert(!K::kTwoOutputs || sizeof(Out) == sizeof(Second));

  struct Turn {
    int64_t write;          // the row to write
    int slot;               // where its statistic is
    int64_t ahead, stat_n;  // the row whose statistic is wanted, and its columns that count; 0: none
  };

  // The statistic of row m + block is taken with the write of row m; that of the first block before.
  template <class Stream>
  [[gnu::noinline]] static void write_rows(K& kernel, int64_t begin, int64_t end, Stream stream) {
    Outputs<K> outputs;
    const int block = kernel.block();
    T sums[kMaxBlock] = {};
    for (int64_t m = begin; m < end && m < begin + block; ++m) sums[m - begin] = statistic(kernel, m);
    if (stream.value) outputs.begin(kernel.row_of(begin, 0));
    Turn turn = {begin, 0, begin, kernel.stat_columns()};
    for (; turn.write < end; ++turn.write) {
      if (turn.slot == 0) {
        kernel.finish(turn.write, static_cast<int>(end - turn.write < block ? end - turn.write : block),
                      sums);
      }
      turn.ahead = turn.write + block;
      if (turn.ahead >= end) turn.ahead = turn.write, turn.stat_n = 0;
      if constexpr (K::kInline) {
        sums[turn.slot] = take<true>(kernel, turn, outputs, stream);
      } else {
        sums[turn.slot] = take_apart(kernel, turn, outputs, stream);
      }
      turn.slot = turn.slot + 1 < block ? turn.slot + 1 : 0;
    }
    if (stream.value) outputs.end();
  }

  // Writes the one row (unless kWrite is false) and returns the statistic of the other.
  template <bool kWrite, class Stream>
  [[gnu::always_inline]] static T take(K& kernel, const Turn& turn, Outputs<K>& outputs, Stream stream) {
    constexpr int kLevel = kSureToStream<Stream> ? K::kStreamLevel : 1;
    const Maybe<Stream> dest{stream};
    const auto stat = kernel.stat_of(turn.ahead);
    auto row = kernel.row_of(turn.write, turn.slot);
    const int64_t stat_n = turn.stat_n;
    int64_t write_n = kWrite ? kernel.columns() : 0, gap = 0;
    if (kWrite && stream.value) {
      gap = outputs.first.gap();  // of the line begun by the row before
      if (gap) write_some(kernel, turn.write, turn.slot, 0, gap, &outputs), outputs.push(gap);
      row.skip(gap), write_n -= gap;
    }
    const int64_t stat_end = stat_n & -kStep, write_end = write_n & -kStep;
    const int64_t both_end = kWrite && stat_end < write_end ? stat_end : write_end;

    Pack<T> lanes[2] = {};  // two, so that one addition need not wait for the last
    Pairwise<T> blocks;
    int64_t i = 0, fold_at = kFoldColumns;
    const auto fold_here = [&] {
      if (i != fold_at || i == stat_n) return;
      blocks.add(sum_of(lanes));
      lanes[0] = lanes[1] = Pack<T>{};
      fold_at += kFoldColumns;
    };
    while (i != both_end) {
      const int64_t end = both_end < fold_at ? both_end : fold_at;
      for (; i != end; i += kStep) {
        stat.template prefetch<kLevel, kStep>(i);
        if (!stream.value) fetch_outputs<kStep>(row, i);
#pragma GCC unroll kUnroll
        for (int u = 0; u < kPacks; u += 2) {
          both_steps(stat, lanes[0], row, i + u * kWidth, dest);
          both_steps(stat, lanes[1], row, i + (u + 1) * kWidth, dest);
        }
      }
      fold_here();
    }
    if constexpr (kWrite) {
      for (int64_t j = i; __builtin_expect(j < write_end, false); j += kSmallStep) {
        stat.template prefetch<kLevel, kSmallStep>(j);
        if (!stream.value) fetch_outputs<kSmallStep>(row, j);
#pragma GCC unroll kUnroll
        for (int u = 0; u < kLeast; ++u) {
          const int64_t at = j + u * kWidth;
          row.store(row.value(at, Full{}), dest, row.out() + at, row.second() + at);
        }
      }
    } else {
      while (i != stat_end) {
        const int64_t end = stat_end < fold_at ? stat_end : fold_at;
        for (; i != end; i += kSmallStep) {
          stat.template prefetch<kLevel, kSmallStep>(i);
#pragma GCC unroll kUnroll
          for (int u = 0; u < kLeast; u += 2) {
            stat.step(lanes[0], i + u * kWidth, Full{});
            stat.step(lanes[1], i + (u + 1) * kWidth, Full{});
          }
        }
        fold_here();
      }
    }
    // A few packs after the last whole step, and those that a write begun within a line left over.
    if (i < stat_n) {
#pragma GCC unroll 1
      for (; i + kWidth <= stat_n; i += kWidth) {
        fold_here();
        stat.step(lanes[0], i, Full{});
        const Pack<T> next = lanes[1];
        lanes[1] = lanes[0], lanes[0] = next;
      }
      fold_here();
      if (i < stat_n) stat.step(lanes[0], i, Part{static_cast<int>(stat_n - i)});
    }
    if (kWrite && stream.value) {
      stage_rest(kernel, turn.write, turn.slot, gap + write_end, outputs);
    } else if (write_end < write_n) {
      finish_row(kernel, turn.write, turn.slot, write_end);
    }
    return blocks.total(sum_of(lanes));
  }

  template <class Stream>
  [[gnu::noinline]] static T take_apart(K& kernel, const Turn& turn, Outputs<K>& outputs, Stream stream) {
    return take<true>(kernel, turn, outputs, stream);
  }

  [[gnu::noinline]] static T statistic(K& kernel, int64_t m) {
    Outputs<K> none;
    return take<false>(kernel, {m, 0, m, kernel.stat_columns()}, none, Settled<false>{});
  }

  [[gnu::always_inline]] static T sum_of(const Pack<T> (&lanes)[2]) {
    return sum(Pack<T>{lanes[0].a + lanes[1].a, lanes[0].b + lanes[1].b});
  }

  // The lines of a step's ordinary stores, some way ahead.
  template <int count, class Row>
  [[gnu::always_inline]] static void fetch_outputs(const Row& row, int64_t i) {
    fetch<1, count>(row.out() + i + kStoreAheadBytes / sizeof(Out));
    if constexpr (K::kTwoOutputs) fetch<1, count>(row.second() + i + kStoreAheadBytes / sizeof(Second));
  }

  template <class Stat, class Row, class Dest>
  [[gnu::always_inline]] static void both_steps(const Stat& stat, Pack<T>& sum, const Row& row, int64_t i,
                                                Dest dest) {
    if constexpr (K::kSharesLoads) {  // before anything is stored: what both read is read once
      const auto value = row.value(i, Full{});
      stat.step(sum, i, Full{});
      row.store(value, dest, row.out() + i, row.second() + i);
    } else {
      stat.step(sum, i, Full{});
      row.store(row.value(i, Full{}), dest, row.out() + i, row.second() + i);
    }
  }

  // Columns [i, end) of a row by ordinary stores, for which whole steps are too long.
  template <class Row>
  [[gnu::always_inline]] static void write_packs(const Row& row, int64_t i, int64_t end, Out* to,
                                                 Second* to2) {
    for (; i + kWidth <= end; i += kWidth) row.store(row.value(i, Full{}), Full{}, to + i, to2 + i);
    if (i == end) return;
    const Part rest{static_cast<int>(end - i)};
    row.store(row.value(i, rest), rest, to + i, to2 + i);
  }

  // To their place, or up to a line of them to the stagers.
  [[gnu::noinline]] static void write_some(K& kernel, int64_t m, int slot, int64_t i, int64_t end,
                                           Outputs<K>* staged) {
    const auto row = kernel.row_of(m, slot);
    Out* const to = staged ? staged->first.at() - i : row.out();
    Second* const to2 = staged ? staged->second.at() - i : row.second();
    write_packs(row, i, end, to, to2);
  }

  // The columns of a row after its last whole step. Apart from write_some in common calls, whose short rows
  // are a dozen instructions shorter so.
  [[gnu::noinline]] static void finish_row(K& kernel, int64_t m, int slot, int64_t i) {
    if constexpr (K::kPlain) {
      const auto row = kernel.row_of(m, slot);
      write_packs(row, i, kernel.columns(), row.out(), row.second());
    } else {
      write_some(kernel, m, slot, i, kernel.columns(), nullptr);
    }
  }

  // The columns of a row from i on, where a line of the output starts: they are staged, line by line.
  [[gnu::noinline]] static void stage_rest(K& kernel, int64_t m, int slot, int64_t i, Outputs<K>& outputs) {
    outputs.resume(kernel.row_of(m, slot), i);
    for (const int64_t n = kernel.columns(); i < n;) {
      const int64_t end = n - i < kLineElements ? n : i + kLineElements;
      write_some(kernel, m, slot, i, end, &outputs);
      outputs.push(end - i);
      i = end;
    }
  }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
