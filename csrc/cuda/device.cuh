// What the kernels take from CUDA, and the one place that tells nvcc from a host compiler, for which
// the emulator in tests/kernels/simt plays the device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <atomic>
#include <cstdint>
#include <cstdio>

#include "plan.h"

#if defined(__CUDACC__)
#include <cuda_pipeline_primitives.h>
#else
#include <simt.h>
#endif

namespace fused_rmsnorm::cuda {

// Bytes of dynamic shared memory, 16-byte aligned.
__device__ __forceinline__ unsigned char* shared_memory() {
#if defined(__CUDACC__)
  extern __shared__ __align__(16) unsigned char bytes[];
  return bytes;
#else
  return simt::shared_memory();
#endif
}

// Brings the 128 bytes round p to the L2 cache. Nothing waits for them.
__device__ __forceinline__ void touch(const void* p) {
#if defined(__CUDACC__)
  [[maybe_unused]] unsigned unused;
  asm volatile("ld.global.L2::128B.b32 %0, [%1];" : "=r"(unused) : "l"(p));
#else
  static_cast<void>(*static_cast<const volatile unsigned*>(p));
#endif
}

// a / b. Left alone, the compiler writes a division of 32 bits beside each of 64, for numbers that are small.
__device__ __forceinline__ int64_t divided(int64_t a, int64_t b) {
#if defined(__CUDACC__)
  int64_t quotient;
  asm("div.s64 %0, %1, %2;" : "=l"(quotient) : "l"(a), "l"(b));
  return quotient;
#else
  return a / b;
#endif
}

// 1 / v and 2^v, of normal results, each an instruction: to one unit in the last place, and to 2^-22 of it.
__device__ __forceinline__ float nearly_inverse(float v) {
#if defined(__CUDACC__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return simt::nearly_inverse(v);
#endif
}
__device__ __forceinline__ float nearly_exp2(float v) {
#if defined(__CUDACC__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(v));
  return result;
#else
  return simt::nearly_exp2(v);
#endif
}

// p, held in a register: left alone, the compiler computes an address of 64 bits anew at each use.
template <class T>
__device__ __forceinline__ T* pinned(T* p) {
#if defined(__CUDACC__)
  asm("" : "+l"(p));
  __builtin_assume(__isGlobal(p));
#endif
  return p;
}

// How many clusters so many blocks are; or which one a block is in. A cluster is of 1, 2, 4 or 8 blocks.
__device__ __forceinline__ unsigned clusters_of(unsigned blocks, int cluster) {
  return blocks >> (cluster / 2 - cluster / 8);
}

// Clusters exist from sm_90 on; kernels that use them are launched nowhere else.
struct Cluster {
#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900)
  static __device__ unsigned rank() { return 0; }
  static __device__ void arrive() {}
  static __device__ void appear() {}
  static __device__ void wait() {}
  template <class T>
  static __device__ T* peer(T* p, unsigned) {
    return p;
  }
#else
  static __device__ unsigned rank() { return __clusterRelativeBlockRank(); }
  static __device__ void arrive() { __cluster_barrier_arrive(); }
  // As arrive(), of a block that has written nothing yet: without the fence before it, which takes as long as
  // a read of memory.
  static __device__ void appear() { __cluster_barrier_arrive_relaxed(); }
  static __device__ void wait() { __cluster_barrier_wait(); }
  // The same place in the shared memory of the block `rank` of this cluster, which must have been met
  // at a barrier: a block may start late and end early.
  template <class T>
  static __device__ T* peer(T* p, unsigned rank) {
    return static_cast<T*>(__cluster_map_shared_rank(p, rank));
  }
#endif
};

// Whether this architecture's launch plan has a use for a kernel. The body of one that is launched
// nowhere is left out.
template <int kShape, bool kCluster>
#if defined(__CUDA_ARCH__)
constexpr bool kLaunched = serves_on(architecture(__CUDA_ARCH__ / 10).clusters, kShape, kCluster);
#else
constexpr bool kLaunched = true;
#endif

struct Launch {
  const char* name;
  int64_t blocks;
  int threads, shared_bytes, cluster;
};

// nullptr, or a message that stands until this thread's next error.
inline const char* message(const Launch& l, cudaError_t error) {
  if (error == cudaSuccess) return nullptr;
  thread_local char text[256];
  std::snprintf(text, sizeof text,
                "%s with %lld blocks of %d threads, %d bytes of shared memory, clusters of %d: %s", l.name,
                static_cast<long long>(l.blocks), l.threads, l.shared_bytes, l.cluster,
#if defined(__CUDACC__)
                cudaGetErrorString(error));
#else
                "failed");
#endif
  return text;
}

// What a call asks the runtime about a device is asked once: a launch itself takes some two microseconds.
constexpr int kRememberedDevices = 64;

#if defined(__CUDACC__)
// Shared memory beyond 48 KB has to be allowed, per kernel and device.
template <auto kKernel>
cudaError_t allow_shared(int bytes) {
  constexpr int kAllowedAnyway = 48 << 10;
  static std::atomic<int> allowed[kRememberedDevices];
  if (bytes <= kAllowedAnyway) return cudaSuccess;
  int device = 0;
  if (const auto error = cudaGetDevice(&device); error != cudaSuccess) return error;
  const bool remembered = device < kRememberedDevices;
  if (remembered && allowed[device].load(std::memory_order_relaxed) >= bytes) return cudaSuccess;
  const auto error = cudaFuncSetAttribute(kKernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (remembered && error == cudaSuccess) allowed[device].store(bytes, std::memory_order_relaxed);
  return error;
}
#endif

template <auto kKernel, class... Args>
const char* launch(const Launch& l, void* stream, const Args&... args) {
  if (l.blocks > kMaxBlocks) return message(l, cudaErrorInvalidConfiguration);  // 32 bits would hide it
#if defined(__CUDACC__)
  if (const auto error = allow_shared<kKernel>(l.shared_bytes); error != cudaSuccess)
    return message(l, error);
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = l.cluster;
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(l.blocks));
  config.blockDim = dim3(l.threads);
  config.dynamicSmemBytes = l.shared_bytes;
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &cluster;
  config.numAttrs = l.cluster > 1 ? 1 : 0;
  return message(l, cudaLaunchKernelEx(&config, kKernel, args...));
#else
  (void)stream;
  simt::launch(l.blocks, l.threads, l.shared_bytes, l.cluster, [&] { kKernel(args...); });
  return nullptr;
#endif
}

// major * 10 + minor of the current device.
inline cudaError_t current_arch(int& arch) {
#if defined(__CUDACC__)
  static std::atomic<int> archs[kRememberedDevices];
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  const bool remembered = error == cudaSuccess && device < kRememberedDevices;
  if (remembered && (arch = archs[device].load(std::memory_order_relaxed))) return cudaSuccess;
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  arch = major * 10 + minor;
  if (remembered && error == cudaSuccess) archs[device].store(arch, std::memory_order_relaxed);
  return error;
#else
  arch = simt::arch;
  return cudaSuccess;
#endif
}

}  // namespace fused_rmsnorm::cuda
