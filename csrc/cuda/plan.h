// How a kernel is launched: a pure function of N, dtypes and the architecture, never of the number
// of rows, so that a row has the same bits in every batch. Host code without CUDA: tests and
// Python (fused_rmsnorm.launch_plan) read it on any machine.
//
// The unit is a vector of 16 bytes of x. A row lies over `threads` threads of `items` vectors each,
// vector v with thread v % threads, whatever its alignment.
#pragma once
#include <cstdint>

#include "../norm.h"

namespace fused_rmsnorm::cuda {

enum class Family {
  registers,  // the row is held in registers between the statistic and the store: one read
  cluster,    // the same, with the row over several blocks that add up through distributed shared memory
  two_pass,   // any length: the row is read twice (backward: dx, and dw by columns, read on their own)
};

struct Plan {
  Family family;
  int shape;           // its place in kShapes, or -1
  int vector;          // elements
  int threads;         // per row and block: 8, 16 or 32 share a warp, more share a block
  int items;           // vectors per thread
  int rows_per_block;  // side by side, times forward's rows in flight per thread
  int cluster;         // blocks per row
  int stages;          // backward: rows whose loads are in flight or in use
  int shared_bytes;    // dynamic
  int64_t max_grid;    // blocks, or clusters, in a grid; in the backward each has its own partial dw and db
};

constexpr int64_t kMaxBlocks = (int64_t{1} << 31) - 1;  // of a grid
constexpr int kLongThreads = 1024;                      // two_pass: threads of a block
constexpr int kColumnThreads = 256;                     // two_pass backward: vectors of columns of a block
constexpr int kMaxCluster = 8;                          // what every sm_90 device schedules
constexpr int kSpan = 256;  // backward: rows of a thread until dw and db are put away
constexpr int kScratchSlots = 2 * (32 + kMaxCluster);  // of 8 bytes, see reduce.cuh
constexpr int kScratchBytes = kScratchSlots * 8;

// The row shapes that kernels are instantiated for, in rising order. Short rows leave room for more
// of them on their way from memory: 64 bytes a thread in the forward, which holds `flight` rows before
// it reduces the first, and as many or more in the backward, which works on one of `stages` rows.
struct Shape {
  int threads, items, flight, stages;
};
constexpr Shape kShapes[] = {{8, 1, 4, 4},  {16, 1, 4, 4},  {32, 1, 4, 4},  {32, 2, 2, 3},  {32, 4, 1, 2},
                             {64, 4, 1, 2}, {128, 4, 1, 2}, {256, 4, 1, 2}, {512, 4, 1, 2}, {1024, 4, 1, 1}};
constexpr int kForwardShapes = 10, kBackwardShapes = 9;  // 1024 x 4 has no registers for dw
constexpr int kClusterShape = 8;                         // the first that also serves clusters
constexpr int kResidentThreads = 512;                    // of a multiprocessor, with 128 registers each

constexpr int block_of(int row_threads) { return row_threads < 128 ? 128 : row_threads; }
template <int kShape>
constexpr int kBlock = block_of(kShapes[kShape].threads);
template <int kShape>
constexpr int kResident = kBlock<kShape> < kResidentThreads ? kResidentThreads / kBlock<kShape> : 1;

// What is fixed per architecture (major * 10 + minor): the multiprocessors of its largest product,
// which sizes the grid of the backward, and the shared memory that a block may have.
struct Architecture {
  int multiprocessors, shared_bytes;
  bool clusters;
};
constexpr Architecture architecture(int arch) {
  if (arch >= 120) return {188, 99 << 10, true};
  if (arch >= 100) return {148, 227 << 10, true};
  if (arch >= 90) return {132, 227 << 10, true};
  if (arch == 80 || arch == 87) return {108, 163 << 10, false};
  if (arch >= 80) return {128, 99 << 10, false};
  return {72, 64 << 10, false};
}

// Of a run of an unaligned row in shared memory (image.cuh), read in vectors of `vector` elements: the run,
// 16 bytes that it shares with what is before it, and up to two vectors that its last one reads.
constexpr int image_bytes(int columns, int vector, int size) { return (columns + 2 * vector) * size + 16; }

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Whether kernels are instantiated for a shape and elements of so many bytes, alone or in clusters.
// fp64 has every second shape, without clusters: it is there to be right.
constexpr bool serves(int shape, int64_t size, bool cluster) {
  if (size == 8) return !cluster && shape % 2 == 0 && shape > 0;
  return !cluster || shape >= kClusterShape;
}
// And on an architecture: a block of 1024 threads fills a multiprocessor alone, so where there are
// clusters two blocks of 512 come first.
constexpr bool serves_on(bool clusters, int shape, bool cluster) {
  return cluster ? clusters : !clusters || shape <= kClusterShape;
}

// The smallest of the first `count` shapes that holds the row, as registers; or, if none does, a
// cluster of two to eight blocks of a large one; or two passes.
constexpr Plan row_plan(int64_t n, Dtype x, const Architecture& a, int count) {
  Plan p{Family::two_pass, -1,        static_cast<int>(16 / size_of(x)), kLongThreads, 1, 1, 1, 1,
         kScratchBytes,    kMaxBlocks};
  const int64_t vectors = ceil_div(n, p.vector);
  const auto holds = [](Shape s) { return int64_t{s.threads} * s.items; };
  const auto take = [&p](Family family, int shape, int cluster) {
    const Shape s = kShapes[shape];
    p.family = family, p.shape = shape, p.threads = s.threads, p.items = s.items, p.cluster = cluster;
    p.rows_per_block = block_of(s.threads) / s.threads;
  };
  const auto usable = [&](int shape, bool cluster) {
    return serves(shape, size_of(x), cluster) && serves_on(a.clusters, shape, cluster);
  };
  for (int i = 0; i < count; ++i) {
    if (usable(i, false) && vectors <= holds(kShapes[i])) return take(Family::registers, i, 1), p;
  }
  for (int i = 0; i < count; ++i) {
    if (!usable(i, true)) continue;
    for (int cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
      if (vectors <= cluster * holds(kShapes[i])) return take(Family::cluster, i, cluster), p;
    }
  }
  return p;
}

// The largest shapes hold the row in shared memory (forward_rows.cuh), of which sm_75 has too little;
// the row's image (image.cuh) takes up to 192 bytes more.
constexpr Plan forward_plan(int64_t n, Dtype x, int arch) {
  const Architecture a = architecture(arch);
  Plan p = row_plan(n, x, a, kForwardShapes);
  if (p.threads * p.items * 16 + 192 + kScratchBytes > a.shared_bytes) p = row_plan(n, x, a, 0);
  p.rows_per_block *= p.shape < 0 ? 1 : kShapes[p.shape].flight;
  p.max_grid /= p.cluster;
  return p;
}

// Two passes of the backward: blocks of columns times partials fill a device several times; and dw's
// partials have at most 2^22 numbers, unless it is a single one.
constexpr Plan with_columns_grid(Plan p, int64_t n) {
  const int64_t fit = (int64_t{1} << 22) / n, most = 4096 / ceil_div(n, kColumnThreads * p.vector);
  p.max_grid = fit < most ? fit : most;
  p.max_grid = p.max_grid < 1 ? 1 : p.max_grid > 64 ? 64 : p.max_grid;
  return p;
}

// dy may be wider than x. As many rows in flight as the shape wants where shared memory allows, else
// one; and as many blocks as are resident together, so that they end together. Two passes: fixed.
constexpr Plan backward_plan(int64_t n, Dtype x, Dtype dy, int arch) {
  const Architecture a = architecture(arch);
  Plan p = row_plan(n, x, a, kBackwardShapes);
  if (p.family != Family::two_pass) {
    const int block = block_of(kShapes[p.shape].threads);
    const int runs = p.cluster > 1 ? p.items : p.rows_per_block, columns = block * p.items * p.vector / runs;
    const int stage = runs * (image_bytes(columns, p.vector, static_cast<int>(size_of(x))) +
                              image_bytes(columns, p.vector, static_cast<int>(size_of(dy))));
    p.stages = kShapes[p.shape].stages;
    if (kScratchBytes + p.stages * stage > a.shared_bytes) p.stages = 1;
    p.shared_bytes = kScratchBytes + p.stages * stage;
    p.max_grid = a.multiprocessors * (kResidentThreads / block) / p.cluster;
    if (p.shared_bytes > a.shared_bytes) p = row_plan(n, x, a, 0);
  }
  return p.family == Family::two_pass ? with_columns_grid(p, n) : p;
}

// From one partial of dw or db to the next, in numbers: whole vectors, so that they are written in pieces.
constexpr int kPartialUnit = 8;
constexpr int64_t partial_stride(int64_t n) { return ceil_div(n, kPartialUnit) * kPartialUnit; }

// How many partials of dw and of db a backward with this plan makes, of each row of the weight.
constexpr int64_t partials_of(const Plan& p, int64_t rows, int64_t weight_rows = 1) {
  const int64_t groups = ceil_div(rows / weight_rows, p.rows_per_block);
  const int64_t most = weight_rows < p.max_grid ? p.max_grid / weight_rows : 1;
  return groups < most ? groups : most;
}

// Calls with a gate or a weight of several rows (forward_general.cuh, backward_general.cuh): fewer vectors a
// thread, which holds more of each, and neither clusters nor rows in flight.
struct GeneralShape {
  int threads, items;
};
constexpr GeneralShape kGeneralShapes[] = {{8, 1},  {16, 1},  {32, 1},  {32, 2},
                                           {64, 2}, {128, 2}, {256, 2}, {512, 2}};
constexpr int kGeneralCount = 8;
constexpr int kGeneralLongThreads = 512;  // two_pass
// Forward: blocks of a multiprocessor in a grid. Each takes several rows in turn, for what it reads of the
// call before the first is as much as a quarter of the work on a short row; and there are enough to end
// together.
constexpr int kGeneralBlocks = 32;
template <int kThreads>
constexpr int kGeneralBlock = block_of(kThreads);

constexpr Plan general_two_pass(Dtype x) {
  return {Family::two_pass, -1,        static_cast<int>(16 / size_of(x)), kGeneralLongThreads, 1, 1, 1, 1,
          kScratchBytes,    kMaxBlocks};
}
constexpr Plan general_forward_plan(int64_t n, Dtype x, int arch) {
  const int64_t most = int64_t{architecture(arch).multiprocessors} * kGeneralBlocks;
  const int vector = static_cast<int>(16 / size_of(x));
  for (int i = 0; i < kGeneralCount; ++i) {
    const GeneralShape s = kGeneralShapes[i];
    if (!serves(i, size_of(x), false) || ceil_div(n, vector) > int64_t{s.threads} * s.items) continue;
    return {Family::registers, i,   vector, s.threads, s.items, block_of(s.threads) / s.threads, 1, 1,
            kScratchBytes,     most};
  }
  return general_two_pass(x);
}
constexpr Plan general_backward_plan(int64_t n, Dtype x, int arch) {
  Plan p = general_forward_plan(n, x, arch);
  if (p.family == Family::two_pass) return with_columns_grid(p, n);
  const Architecture a = architecture(arch);
  const int block = p.threads * p.rows_per_block;
  p.max_grid = a.multiprocessors * (kResidentThreads / block);
  // What a gate's exponential gave, for the second reading; or dw and db of rows side by side, when they are
  // added up: in fp64, which has no gate, half as many numbers of twice the size.
  p.shared_bytes += block * p.items * p.vector * 8;
  return p.shared_bytes <= a.shared_bytes ? p : with_columns_grid(general_two_pass(x), n);
}

// The plan of a call.
template <class Call>
constexpr bool is_general(const Call& call) {
  return call.gate != Gate::none || call.weight_has_rows;
}
constexpr Plan plan_of(const Forward& f, int arch) {
  return is_general(f) ? general_forward_plan(f.n, f.x_dtype, arch) : forward_plan(f.n, f.x_dtype, arch);
}
constexpr Plan plan_of(const Backward& b, int arch) {
  return is_general(b) ? general_backward_plan(b.n, b.x_dtype, arch)
                       : backward_plan(b.n, b.x_dtype, b.dy_dtype, arch);
}

}  // namespace fused_rmsnorm::cuda
