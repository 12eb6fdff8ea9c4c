// The entry points of the CPU backend: which instruction set, how rows are cut, when to stream.
// This file is compiled without instruction set flags.
#include <cstdlib>
#include <cstring>
#include <initializer_list>

#include "kernels.h"

#if defined(__x86_64__)
#include <cpuid.h>
#else
#include <unistd.h>
#endif

namespace fused_rmsnorm::cpu {
namespace {

#if defined(__x86_64__)

// The best that the machine has, up to the cap that ATen honours too.
const Kernels& choose() {
  const char* cap = std::getenv("ATEN_CPU_CAPABILITY");
  if (!cap) cap = "";
  if (std::strcmp(cap, "default") == 0) return baseline_kernels;
  if (supported(avx512_kernels) && std::strcmp(cap, "avx2") != 0) return avx512_kernels;
  return supported(avx2_kernels) ? avx2_kernels : baseline_kernels;
}

// Bytes of the largest cache that one core shares. From cpuid itself: in virtual machines sysconf
// has been seen to multiply an AMD core's share by the number of cores of the host.
int64_t last_level_cache() {
  unsigned a, b, c, d;
  for (const unsigned leaf : {0x8000001du, 4u}) {  // AMD's, then Intel's; the same layout
    int64_t largest = 0;
    for (unsigned i = 0; i < 8 && __get_cpuid_count(leaf, i, &a, &b, &c, &d) && (a & 31); ++i) {
      const int64_t ways = (b >> 22) + 1, partitions = (b >> 12 & 0x3ff) + 1, line = (b & 0xfff) + 1;
      const int64_t size = ways * partitions * line * (int64_t{c} + 1);
      if (size > largest) largest = size;
    }
    if (largest) return largest;
  }
  return int64_t{32} << 20;
}

#else

const Kernels& choose() { return baseline_kernels; }
int64_t last_level_cache() {
  const long size = sysconf(_SC_LEVEL3_CACHE_SIZE);
  return size > 0 ? size : int64_t{32} << 20;
}

#endif

const Kernels& kernels = choose();
const int64_t cache_bytes = last_level_cache();

constexpr int64_t kLine = 64;
constexpr int64_t kGrainElements = 32768;  // a few microseconds: what waking a thread costs

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
uintptr_t offset_in_line(const void* p) { return reinterpret_cast<uintptr_t>(p) % kLine; }

// Writing past the caches pays when the result would not stay in them anyway, and needs rows of
// several lines. It costs where the output's pages are touched for the first time, which glibc makes
// the rule for tensors of some MiB: 4096 x 4096 fp32 took 22.6 ms streamed, 15.1 ms not. And a virtual
// machine of two cores may report the cache of the whole host (480 MiB), so neither limit does alone.
constexpr int64_t kLeastStreamed = int64_t{512} << 20;

bool should_stream(int64_t rows, int64_t n, int64_t element_bytes) {
  const int64_t bytes = rows * n * element_bytes;
  return n * element_bytes >= 8 * kLine && bytes >= cache_bytes && bytes >= kLeastStreamed;
}

}  // namespace

#if defined(__x86_64__)
bool supported(const Kernels& k) {
  __builtin_cpu_init();
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c");
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

// At most 128 chunks, of at least 16 rows and of enough work: a partial is written and read once
// per chunk, which stays a few per cent of the rows' own traffic. From rows and n alone.
Chunks plan(const Backward& b) {
  Chunks c;
  c.rows_per_chunk = ceil_div(b.rows, 128);
  const int64_t least = ceil_div(kGrainElements, b.n);
  if (c.rows_per_chunk < least) c.rows_per_chunk = least;
  if (c.rows_per_chunk < 16) c.rows_per_chunk = 16;
  c.count = b.rows ? ceil_div(b.rows, c.rows_per_chunk) : 0;
  c.stride = ceil_div(b.n, kLine) * kLine;
  c.per_chunk = c.stride * ((b.dw ? 1 : 0) + (b.db ? 1 : 0));
  return c;
}

const char* capability() { return kernels.name; }

void forward(const Forward& f, int64_t row_begin, int64_t row_end) {
  const bool stream = should_stream(f.rows, f.n, size_of(f.y_dtype)) &&
                      (!f.residual.data || offset_in_line(f.y) == offset_in_line(f.sum));
  kernels.forward(f, row_begin, row_end, stream);
}

int64_t forward_grain(const Forward& f) { return ceil_div(kGrainElements, f.n); }

int64_t backward_workspace(const Backward& b) {
  const Chunks c = plan(b);
  return c.count * c.per_chunk * (b.x_dtype == Dtype::f64 ? 8 : 4);
}

int64_t backward_chunks(const Backward& b) { return plan(b).count; }

void backward(const Backward& b, int64_t chunk_begin, int64_t chunk_end) {
  const bool stream = b.dx && should_stream(b.rows, b.n, size_of(b.x_dtype));
  kernels.backward(b, plan(b), chunk_begin, chunk_end, stream);
}

void backward_merge(const Backward& b, int64_t col_begin, int64_t col_end) {
  kernels.merge(b, plan(b), col_begin, col_end);
}

}  // namespace fused_rmsnorm::cpu
