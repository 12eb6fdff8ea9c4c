// What each kernels_*.cpp exports: one table of plain functions, and nothing else.
#pragma once
#include <cstdint>

#include "../norm.h"

namespace fused_rmsnorm::cpu {

// How the rows of a backward are cut, and where the partial sums of each chunk lie: for dw, then for db,
// of those that are wanted, rows_per_partial rows of `stride` elements of float (double for f64).
//
// Of several rows of weight there are two ways. Runs: chunks lie within a run of rows that take the same
// row of the weight (a weight per sample), and a partial has one row. Else (heads, groups of a row) a
// chunk is made of whole turns through the weight's rows, and its partial has them all.
struct Chunks {
  int64_t runs, rows_per_run;     // in order of the weight's rows; one run of all rows where there are none
  int64_t rows_per_chunk, count;  // of a run: count chunks, the last perhaps shorter
  int64_t rows_per_partial;
  int64_t partials;   // of each row of the weight, one after the other
  int64_t stride;     // a row of a partial, padded to whole packs of every instruction set
  int64_t per_chunk;  // a chunk's elements
};

struct Kernels {
  const char* name;
  // stream: write past the caches. The bits do not depend on it.
  void (*forward)(const Forward&, int64_t row_begin, int64_t row_end, bool stream);
  void (*backward)(const Backward&, const Chunks&, int64_t chunk_begin, int64_t chunk_end, bool stream);
  void (*merge)(const Backward&, const Chunks&, int64_t col_begin, int64_t col_end);
};

// The chunks of a backward: a function of its sizes and the gradients wanted, never of the machine.
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
