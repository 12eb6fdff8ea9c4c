// What each kernels_*.cpp exports: one table of plain functions, and nothing else.
#pragma once
#include <cstdint>

#include "../norm.h"

namespace fused_rmsnorm::cpu {

// How the rows of a backward are cut, and where the partial sums of each chunk lie: `stride`
// elements of float (double for f64) for dw, then as many for db, of those that are wanted.
struct Chunks {
  int64_t rows_per_chunk, count;
  int64_t stride;     // one partial, padded to whole packs of every instruction set
  int64_t per_chunk;  // stride times the number of gradients wanted
};

struct Kernels {
  const char* name;
  // stream: write past the caches. The bits do not depend on it.
  void (*forward)(const Forward&, int64_t row_begin, int64_t row_end, bool stream);
  void (*backward)(const Backward&, const Chunks&, int64_t chunk_begin, int64_t chunk_end, bool stream);
  void (*merge)(const Backward&, const Chunks&, int64_t col_begin, int64_t col_end);
};

// The chunks of a backward: a function of rows, n and the gradients wanted, never of the machine.
Chunks plan(const Backward&);

extern const Kernels baseline_kernels;
#if defined(__x86_64__)
extern const Kernels avx2_kernels;
extern const Kernels avx512_kernels;
#elif defined(__aarch64__)
extern const Kernels neon_kernels;
#endif

// Whether this machine runs them.
bool supported(const Kernels&);

}  // namespace fused_rmsnorm::cpu
