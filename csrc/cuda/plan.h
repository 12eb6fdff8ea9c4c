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
constexpr int kColumnThreads = 256;                     // two_pass backward: columns of a block
constexpr int kMaxCluster = 8;                          // what every sm_90 device schedules
constexpr int kScratchSlots = 2 * (32 + kMaxCluster);   // of 8 bytes, see reduce.cuh
constexpr int kScratchBytes = kScratchSlots * 8;

// Threads and items of the row shapes that kernels are instantiated for, in rising order.
struct Shape {
  int threads, items;
};
constexpr Shape kShapes[] = {{8, 1},  {16, 1},  {32, 1},  {32, 2},  {32, 4},
                             {64, 4}, {128, 4}, {256, 4}, {512, 4}, {1024, 4}};
constexpr int kForwardShapes = 10, kBackwardShapes = 9;  // 1024 x 4 has no registers for dw
constexpr int kClusterShape = 8;                         // the first that also serves clusters

// Rows that a thread of the forward reads before it reduces the first: 64 bytes on their way per
// thread at every shape.
constexpr int rows_in_flight(Shape s) { return s.items < 4 ? 4 / s.items : 1; }

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

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// The smallest of the first `count` shapes that holds the row, as registers; or, if none does, a
// cluster of two to eight blocks of a large one; or two passes. A block of 1024 threads fills a
// multiprocessor alone, so where there are clusters two blocks of 512 come first.
constexpr Plan row_plan(int64_t n, Dtype x, const Architecture& a, int count) {
  Plan p{Family::two_pass, static_cast<int>(16 / size_of(x)), kLongThreads, 1, 1, 1, 1, kScratchBytes,
         kMaxBlocks};
  const int64_t vectors = ceil_div(n, p.vector);
  const auto holds = [](Shape s) { return int64_t{s.threads} * s.items; };
  const auto take = [&p](Family family, Shape s, int cluster) {
    p.family = family, p.threads = s.threads, p.items = s.items, p.cluster = cluster;
    p.rows_per_block = s.threads >= 128 ? 1 : 128 / s.threads;
  };
  for (int i = 0; i < count; ++i) {
    if (a.clusters && i > kClusterShape) break;
    if (vectors <= holds(kShapes[i])) return take(Family::registers, kShapes[i], 1), p;
  }
  for (int i = kClusterShape; a.clusters && i < count; ++i) {
    for (int cluster = 2; cluster <= kMaxCluster; cluster *= 2) {
      if (vectors <= cluster * holds(kShapes[i])) return take(Family::cluster, kShapes[i], cluster), p;
    }
  }
  return p;
}

constexpr Plan forward_plan(int64_t n, Dtype x, int arch) {
  Plan p = row_plan(n, x, architecture(arch), kForwardShapes);
  if (p.family == Family::registers) p.rows_per_block *= rows_in_flight({p.threads, p.items});
  p.max_grid /= p.cluster;
  return p;
}

// dy may be wider than x. Two rows in flight where shared memory allows, else one.
constexpr Plan backward_plan(int64_t n, Dtype x, Dtype dy, int arch) {
  const Architecture a = architecture(arch);
  const int64_t bytes = 16 + 16 * size_of(dy) / size_of(x);  // of a vector of x and one of dy
  const auto stage = [bytes](const Plan& p) {
    return static_cast<int>(bytes * p.threads * p.rows_per_block * p.items);
  };
  Plan p = row_plan(n, x, a, kBackwardShapes);
  if (p.family != Family::two_pass) {
    p.stages = kScratchBytes + 2 * stage(p) <= a.shared_bytes ? 2 : 1;
    p.shared_bytes = kScratchBytes + p.stages * stage(p);
    if (p.shared_bytes > a.shared_bytes) p = row_plan(n, x, a, 0);
  }
  // Enough blocks to fill every multiprocessor with 1024 threads; two passes: fixed.
  const int block = p.threads * p.rows_per_block;
  const int per_multiprocessor = block >= 1024 ? 1 : 1024 / block;
  p.max_grid = p.family == Family::two_pass ? 64 : a.multiprocessors * per_multiprocessor / p.cluster;
  return p;
}

}  // namespace fused_rmsnorm::cuda
