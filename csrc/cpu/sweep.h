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

inline int block_rows(int64_t n, int64_t size) {
  const int64_t rows = kBlockBytes / (n * size);
  return rows < 1 ? 1 : rows > kMaxBlock ? kMaxBlock : static_cast<int>(rows);
}

template <bool kStream>
struct StoreKind {
  using type = Full;
};
template <>
struct StoreKind<true> {
  using type = Streamed;
};

// Goes over rows. The loops have one counter, the column: what a kernel adds to it are pointers, which
// start where the step's row does. What is done once per row is a third of the work in one of 128 elements,
// so the forward's turns are inlined into the loop over rows.
template <bool kStream, class K>
class Sweep {
 public:
  using T = typename K::T;

  // All rows of [begin, end). The statistic of row m + block is taken with the write of row m; that of
  // the first block before.
  [[gnu::noinline]] static void rows(K& kernel, int64_t begin, int64_t end) {
    if (begin >= end) return;
    Outputs<K> outputs;
    if (!kernel.writes()) {
      for (int64_t m = begin; m < end; ++m) statistic(kernel, m, outputs);
      return;
    }
    const int block = kernel.block();
    T sums[kMaxBlock] = {};
    for (int64_t m = begin; m < end && m < begin + block; ++m)
      sums[m - begin] = statistic(kernel, m, outputs);
    if constexpr (kStream) outputs.begin(kernel.row_of(begin, 0));
    Turn turn = {begin, 0, begin, kernel.stat_columns()};
    for (; turn.write < end; ++turn.write) {
      if (turn.slot == 0) {
        kernel.finish(turn.write, static_cast<int>(end - turn.write < block ? end - turn.write : block),
                      sums);
      }
      turn.ahead = turn.write + block;
      if (turn.ahead >= end) turn.ahead = turn.write, turn.stat_n = 0;
      if constexpr (K::kInline) {
        sums[turn.slot] = take<true>(kernel, turn, outputs);
      } else {
        sums[turn.slot] = take_apart(kernel, turn, outputs);
      }
      turn.slot = turn.slot + 1 < block ? turn.slot + 1 : 0;
    }
    if constexpr (kStream) outputs.end();
  }

 private:
  using Out = typename K::Out;
  using Second = typename K::Second;
  using Dest = typename StoreKind<kStream>::type;
  static constexpr int kWidth = Pack<T>::width;
  static constexpr int kPackBytes = kWidth * sizeof(Out);
  // A step streams whole lines. Of common calls it has more packs, so that a step's own instructions are
  // shared by more elements; more code to compile, though.
  static constexpr int kLeast = 2 * kPackBytes >= kLine ? 2 : 4;
  static constexpr int kPacks = K::kPlain && kWidth * sizeof(T) < 2 * kLine ? 4 : kLeast;
  static constexpr int kStep = kPacks * kWidth, kSmallStep = kLeast * kWidth;
  static_assert(kSmallStep * sizeof(Out) % kLine == 0 && kStep % kSmallStep == 0 &&
                kFoldColumns % kStep == 0);

  struct Turn {
    int64_t write;          // the row to write
    int slot;               // where its statistic is
    int64_t ahead, stat_n;  // the row whose statistic is wanted, and its columns that count; 0: none
  };

  // Writes the one row (unless kWrite is false) and returns the statistic of the other.
  template <bool kWrite>
  [[gnu::always_inline]] static T take(const K& kernel, const Turn& turn, Outputs<K>& outputs) {
    const auto stat = kernel.stat_of(turn.ahead);
    auto row = kernel.row_of(turn.write, turn.slot);
    const int64_t stat_n = turn.stat_n;
    int64_t write_n = kWrite ? kernel.columns() : 0;
    if constexpr (kStream && kWrite) {
      const int64_t gap = outputs.first.gap();
      if (gap) fill_line(row, gap, outputs);
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
        stat.template prefetch<kStep>(i);
        fetch_outputs<kStep>(row, i);
#pragma GCC unroll 4
        for (int u = 0; u < kPacks; ++u) both_steps(stat, lanes[u % 2], row, i + u * kWidth);
      }
      fold_here();
    }
    if constexpr (kWrite) {
      for (int64_t j = i; __builtin_expect(j < write_end, false); j += kSmallStep) {
        stat.template prefetch<kSmallStep>(j);
        fetch_outputs<kSmallStep>(row, j);
#pragma GCC unroll 4
        for (int u = 0; u < kLeast; ++u) write_step(row, j + u * kWidth, Full{}, Dest{});
      }
    } else {
      while (i != stat_end) {
        const int64_t end = stat_end < fold_at ? stat_end : fold_at;
        for (; i != end; i += kSmallStep) {
          stat.template prefetch<kSmallStep>(i);
#pragma GCC unroll 4
          for (int u = 0; u < kLeast; ++u) stat.step(lanes[u % 2], i + u * kWidth, Full{});
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
    if constexpr (kStream && kWrite) {
      stage_rest(row, write_end, write_n, outputs);
    } else if (write_end < write_n) {
      finish_row(kernel, turn.write, turn.slot, write_end);
    }
    return blocks.total(sum_of(lanes));
  }

  [[gnu::noinline]] static T take_apart(const K& kernel, const Turn& turn, Outputs<K>& outputs) {
    return take<true>(kernel, turn, outputs);
  }

  [[gnu::noinline]] static T statistic(const K& kernel, int64_t m, Outputs<K>& outputs) {
    return take<false>(kernel, {m, 0, m, kernel.stat_columns()}, outputs);
  }

  [[gnu::always_inline]] static T sum_of(const Pack<T> (&lanes)[2]) {
    return sum(Pack<T>{lanes[0].a + lanes[1].a, lanes[0].b + lanes[1].b});
  }

  // The lines of a step's ordinary stores, some way ahead.
  template <int count, class Row>
  [[gnu::always_inline]] static void fetch_outputs(const Row& row, int64_t i) {
    if constexpr (!kStream) {
      fetch<1, count>(row.out() + i + kStoreAheadBytes / sizeof(Out));
      if constexpr (K::kTwoOutputs) fetch<1, count>(row.second() + i + kStoreAheadBytes / sizeof(Second));
    }
  }

  template <class Row, class Lanes, class To>
  [[gnu::always_inline]] static void write_step(const Row& row, int64_t i, Lanes lanes, To to) {
    row.store(row.value(i, lanes), to, row.out() + i, row.second() + i);
  }

  template <class Stat, class Row>
  [[gnu::always_inline]] static void both_steps(const Stat& stat, Pack<T>& sum, const Row& row, int64_t i) {
    if constexpr (K::kSharesLoads) {  // before anything is stored: what both read is read once
      const auto value = row.value(i, Full{});
      stat.step(sum, i, Full{});
      row.store(value, Dest{}, row.out() + i, row.second() + i);
    } else {
      stat.step(sum, i, Full{});
      write_step(row, i, Full{}, Dest{});
    }
  }

  // The columns of a row after its last whole step, by ordinary stores.
  [[gnu::noinline]] static void finish_row(const K& kernel, int64_t m, int slot, int64_t i) {
    const auto row = kernel.row_of(m, slot);
    const int64_t n = kernel.columns();
    for (; i + kWidth <= n; i += kWidth) write_step(row, i, Full{}, Full{});
    if (i == n) return;
    const Part rest{static_cast<int>(n - i)};
    write_step(row, i, rest, rest);
  }

  // The first columns of a row, up to the end of the line begun by the row before. Rows go by value: one
  // whose address is known would be read from memory at every step of the loops.
  template <class Row>
  [[gnu::noinline]] static void fill_line(Row row, int64_t gap, Outputs<K>& outputs) {
    for (int64_t i = 0; i < gap; i += kWidth) {
      row.store(row.value(i, Full{}), Full{}, outputs.first.at() + i, outputs.second.at() + i);
    }
    outputs.push(gap);
  }

  // The columns of a row after its last whole step: whole lines streamed, and the rest staged.
  template <class Row>
  [[gnu::noinline]] static void stage_rest(Row row, int64_t i, int64_t n, Outputs<K>& outputs) {
    if constexpr (kPackBytes >= kLine) {
      for (; i + kWidth <= n; i += kWidth) write_step(row, i, Full{}, Streamed{});
    }
    outputs.resume(row, i);
    const int64_t rest = n - i;
    for (int64_t at = 0; at < rest; at += kWidth) {
      Out* const to = outputs.first.at() + at;
      Second* const to2 = outputs.second.at() + at;
      if (rest - at >= kWidth) {
        row.store(row.value(i + at, Full{}), Full{}, to, to2);
      } else {
        row.store(row.value(i + at, Part{static_cast<int>(rest - at)}), Full{}, to, to2);
      }
    }
    outputs.push(rest);
  }
};

}  // namespace
}  // namespace fused_rmsnorm::cpu
