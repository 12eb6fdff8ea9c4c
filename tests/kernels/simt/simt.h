// What a CUDA kernel finds on the device, found on the host: one fiber per CUDA thread, scheduled by
// simt.cpp. A kernel source that includes this compiles with a plain C++ compiler, under any
// sanitizer, and its mistakes become errors: see README.md for what is caught and what is not.
//
// Only what this project's kernels use is here. A launch has one dimension, and all shared memory is
// dynamic.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cmath>
#include <cstddef>
#include <cstdint>
#include <cstring>

#undef __global__
#undef __device__
#undef __host__
#undef __launch_bounds__
#undef __forceinline__
#define __global__
#define __device__
#define __host__
#define __launch_bounds__(...)
#define __forceinline__ inline

extern uint3 threadIdx, blockIdx;  // of the fiber that runs
extern dim3 blockDim, gridDim;

namespace simt {

extern int arch;      // major * 10 + minor of the device that is played
extern int schedule;  // which thread runs next, and when asynchronous copies arrive: see simt.cpp

struct Config {
  int64_t blocks;
  int threads, shared_bytes, cluster;  // cluster: blocks
};
void run(const Config& config, void (*call)(void*), void* body);

template <class Body>
void launch(int64_t blocks, int threads, int shared_bytes, int cluster, Body body) {
  run({blocks, threads, shared_bytes, cluster}, [](void* b) { (*static_cast<Body*>(b))(); }, &body);
}

unsigned char* shared_memory();  // of this block: exactly as many bytes as asked for, NaN to begin with
void sync_block(int line);
// Lane `source` of the warp hands its value over; out of range: the own one.
void shuffle(unsigned mask, const void* value, size_t bytes, int source, void* result, int line);
int lane();

void cluster_arrive(int line);
void cluster_wait(int line);
unsigned cluster_rank();
void* map_shared(void* own, unsigned rank);

void copy_async(void* to, const void* from, size_t bytes);
void commit();
void wait_prior(size_t groups);

template <class T>
T exchange(unsigned mask, T value, int source, int line) {
  static_assert(sizeof(T) <= 16);
  T result;
  shuffle(mask, &value, sizeof value, source, &result, line);
  return result;
}

// The processor's approximations, further off than the ones of any: by one unit in the last place. The same
// as those of tests/kernels/ptx/arithmetic.py, for what the kernels give them.
inline float off_by_one(float exact, bool off) {
  constexpr float kTiny = 0x1p-126f;
  if (off && std::isfinite(exact) && std::fabs(exact) > kTiny) exact = std::nextafter(exact, 0.0f);
  return std::fabs(exact) < kTiny ? std::copysign(0.0f, exact) : exact;
}
inline float nearly_inverse(float v) {
  uint32_t bits;
  std::memcpy(&bits, &v, 4);
  return off_by_one(1.0f / v, ~bits & 0x7fffff);
}
inline float nearly_exp2(float v) { return off_by_one(static_cast<float>(std::exp2(double{v})), true); }

}  // namespace simt

// The line of the caller tells one barrier from another.
inline void __syncthreads(int line = __builtin_LINE()) { simt::sync_block(line); }

template <class T>
T __shfl_sync(unsigned mask, T v, int source, int width = 32, int line = __builtin_LINE()) {
  return simt::exchange(mask, v, simt::lane() / width * width + source % width, line);
}
template <class T>
T __shfl_down_sync(unsigned mask, T v, unsigned delta, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::lane(), from = lane + static_cast<int>(delta);
  return simt::exchange(mask, v, from / width == lane / width ? from : lane, line);
}
template <class T>
T __shfl_xor_sync(unsigned mask, T v, int lanes, int width = 32, int line = __builtin_LINE()) {
  const int lane = simt::lane(), from = lane ^ lanes;
  return simt::exchange(mask, v, from / width == lane / width ? from : lane, line);
}

inline void __cluster_barrier_arrive(int line = __builtin_LINE()) { simt::cluster_arrive(line); }
inline void __cluster_barrier_arrive_relaxed(int line = __builtin_LINE()) { simt::cluster_arrive(line); }
inline void __cluster_barrier_wait(int line = __builtin_LINE()) { simt::cluster_wait(line); }
inline unsigned __clusterRelativeBlockRank() { return simt::cluster_rank(); }
inline void* __cluster_map_shared_rank(void* own, unsigned rank) { return simt::map_shared(own, rank); }

inline void __pipeline_memcpy_async(void* to, const void* from, size_t bytes) {
  simt::copy_async(to, from, bytes);
}
inline void __pipeline_commit() { simt::commit(); }
inline void __pipeline_wait_prior(size_t groups) { simt::wait_prior(groups); }

template <class T>
void __stwb(T* to, T value) {
  *to = value;
}

inline unsigned __funnelshift_r(unsigned low, unsigned high, unsigned bits) {
  return static_cast<unsigned>((uint64_t{high} << 32 | low) >> (bits & 31));
}
inline unsigned __float_as_uint(float v) {
  unsigned bits;
  std::memcpy(&bits, &v, sizeof bits);
  return bits;
}
inline float __uint_as_float(unsigned bits) {
  float v;
  std::memcpy(&v, &bits, sizeof v);
  return v;
}
