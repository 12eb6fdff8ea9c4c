// The entry points of the CPU backend: which instruction set, how rows are cut, when to stream.
// This file is compiled without instruction set flags.
#if defined(__x86_64__)
#include <cpuid.h>
#endif

#include <algorithm>
#include <chrono>
#include <cstdlib>
#include <cstring>

#include "kernels.h"

namespace fused_rmsnorm::cpu {
namespace {

// The best that the machine has, up to the cap that ATen honours too.
const Kernels& choose() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  if (!cap) cap = "";
  if (std::strcmp(cap, "default") == 0) return baseline_kernels;
#if defined(__x86_64__)
  if (supported(avx512_kernels) && std::strcmp(cap, "avx2") != 0) return avx512_kernels;
  if (supported(avx2_kernels)) return avx2_kernels;
#elif defined(__aarch64__)
  return neon_kernels;
#endif
  return baseline_kernels;
}

const Kernels& kernels = choose();

constexpr int64_t kLine = 64;

// A few microseconds of work: what waking a thread costs. The backward does twice as much per element.
constexpr int64_t kForwardGrain = 32768, kBackwardGrain = 16384;

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
uintptr_t offset_in_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine; }

// Writes units [begin, end) with ordinary stores or past the caches, whichever is faster here and now:
// the first megabyte of a large output is written both ways in turn, and timed. No size decides it. Past
// the caches, 4096 x 4096 fp32 took 6.6 ms instead of 9.0 where the output's pages were there and cold,
// but 46 ms instead of 31 where they were fresh (as glibc maps them for large tensors), and twice as long
// where they were in the last-level cache, whose share of a virtual machine nobody knows. From 8 MiB on
// the choice holds if the result is read at once, too. run(begin, end, stream) may be called for any part.
template <class Run>
void run_faster(int64_t begin, int64_t end, int64_t unit_bytes, bool can_stream, const Run& run) {
  constexpr int64_t kLeast = int64_t{8} << 20, kPiece = int64_t{256} << 10;
  if (!can_stream || (end - begin) * unit_bytes < kLeast) return run(begin, end, false);
  using Clock = std::chrono::steady_clock;
  const int64_t piece = ceil_div(kPiece, unit_bytes);
  Clock::duration best[2] = {Clock::duration::max(), Clock::duration::max()};
  for (int i = 0; i < 4 && begin + piece < end; ++i, begin += piece) {
    const auto start = Clock::now();
    run(begin, begin + piece, i % 2 != 0);
    best[i % 2] = std::min(best[i % 2], Clock::now() - start);
  }
  run(begin, end, best[1] < best[0]);
}

// Past the caches whole lines are written; rows of a few lines have too many ends.
bool can_stream(int64_t n, int64_t element_bytes) { return n * element_bytes >= 8 * kLine; }

}  // namespace

#if defined(__x86_64__)
bool supported(const Kernels& k) {
  __builtin_cpu_init();
  unsigned a, b, features = 0, d;
  __get_cpuid(1, &a, &b, &features, &d);  // clang 14's __builtin_cpu_supports does not know f16c
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && (features & bit_F16C);
  if (&k == &avx2_kernels) return avx2;
  if (&k == &avx512_kernels) {
    return avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  }
  return true;
}
#else
bool supported(const Kernels&) { return true; }
#endif

// Up to 128 chunks, each of enough work. A partial is written and read once per chunk: with 16 rows a
// few per cent of the rows' own traffic. The first eight may have four rows each, for otherwise 16 rows
// of 4096 would keep one thread only. A power of two, so that two, four or eight threads get equal shares
// (80 x 1000: four chunks of 20 rows, not five, of 17 and 12). No chunk has more than 1024 rows, though:
// the error of a column's sum grows with the rows that are added one after the other. From sizes alone.
//
// Under several rows of weight, rows are counted by row of the weight. Runs are what chunks are cut from
// where one turn through the weight's rows is all there is, and where they are few or long.
Chunks plan(const Backward& b) {
  constexpr int64_t kMost = 128, kMostRows = 1024;
  const int64_t turns = b.rows / (b.weight_rows * b.weight_share);
  const bool few = b.weight_share > 1 && turns * b.weight_rows <= kMost;
  const bool by_runs = b.weight_rows > 1 && (turns == 1 || few || b.weight_share > kMostRows);
  Chunks c;
  c.runs = by_runs ? turns * b.weight_rows : 1;
  c.rows_per_run = b.rows / c.runs;
  // Chunks are made of units: rows, or whole turns, that have `share` rows for each of the weight.
  const int64_t unit = by_runs ? 1 : b.weight_rows * b.weight_share, share = by_runs ? 1 : b.weight_share;
  const int64_t units = c.rows_per_run / unit, grain = ceil_div(kBackwardGrain, unit * b.n);
  const auto least_units = [&](int64_t count) {
    return std::max<int64_t>(grain, ceil_div(count <= 8 ? 4 : 16, share));
  };
  int64_t count = 1;
  while (units * share > kMostRows * count ||
         (2 * c.runs * count <= kMost && units >= 2 * count * least_units(2 * c.runs * count))) {
    count *= 2;
  }
  const int64_t units_per_chunk = std::max<int64_t>(1, ceil_div(units, count));
  c.rows_per_chunk = units_per_chunk * unit;
  c.count = ceil_div(units, units_per_chunk);
  c.rows_per_partial = by_runs ? 1 : b.weight_rows;
  c.partials = by_runs ? turns * c.count : c.count;
  c.stride = ceil_div(b.n, kLine) * kLine;
  c.per_chunk = c.rows_per_partial * c.stride * ((b.dw ? 1 : 0) + (b.db ? 1 : 0));
  return c;
}

const char* capability() { return kernels.name; }

void forward(const Forward& f, int64_t row_begin, int64_t row_end) {
  const int64_t size = size_of(f.y_dtype);
  const bool both_aligned = !f.residual.data || offset_in_line(f.y) == offset_in_line(f.sum);
  run_faster(row_begin, row_end, f.n * size, both_aligned && can_stream(f.n, size),
             [&](int64_t begin, int64_t end, bool stream) { kernels.forward(f, begin, end, stream); });
}

int64_t forward_grain(const Forward& f) { return ceil_div(kForwardGrain, f.n); }

int64_t backward_workspace(const Backward& b) {
  const Chunks c = plan(b);
  return c.runs * c.count * c.per_chunk * (b.x_dtype == Dtype::f64 ? 8 : 4);
}

int64_t backward_chunks(const Backward& b) {
  const Chunks c = plan(b);
  return c.runs * c.count;
}

int64_t backward_grain(const Backward& b) { return ceil_div(kBackwardGrain, plan(b).rows_per_chunk * b.n); }

void backward(const Backward& b, int64_t chunk_begin, int64_t chunk_end) {
  const int64_t size = size_of(b.x_dtype);
  const Chunks chunks = plan(b);
  const bool both_aligned = b.gate == Gate::none || offset_in_line(b.dx) == offset_in_line(b.dz);
  run_faster(chunk_begin, chunk_end, chunks.rows_per_chunk * b.n * size,
             b.dx && both_aligned && can_stream(b.n, size), [&](int64_t begin, int64_t end, bool stream) {
               kernels.backward(b, chunks, begin, end, stream);
             });
}

void backward_merge(const Backward& b, int64_t col_begin, int64_t col_end) {
  kernels.merge(b, plan(b), col_begin, col_end);
}

}  // namespace fused_rmsnorm::cpu
