// What the kernels take from CUDA, and the one place that tells nvcc from a host compiler, for which
// the emulator in tests/simt plays the device.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime_api.h>

#include <cstdint>
#include <cstdio>

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

// Clusters exist from sm_90 on; kernels that use them are launched nowhere else.
struct Cluster {
#if defined(__CUDACC__) && (!defined(__CUDA_ARCH__) || __CUDA_ARCH__ < 900)
  static __device__ unsigned rank() { return 0; }
  static __device__ void arrive() {}
  static __device__ void wait() {}
  template <class T>
  static __device__ T* peer(T* p, unsigned) {
    return p;
  }
#else
  static __device__ unsigned rank() { return __clusterRelativeBlockRank(); }
  static __device__ void arrive() { __cluster_barrier_arrive(); }
  static __device__ void wait() { __cluster_barrier_wait(); }
  // The same place in the shared memory of the block `rank` of this cluster, which must have been met
  // at a barrier: a block may start late and end early.
  template <class T>
  static __device__ T* peer(T* p, unsigned rank) {
    return static_cast<T*>(__cluster_map_shared_rank(p, rank));
  }
#endif
};

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

template <class... Params, class... Args>
const char* launch(const Launch& l, void* stream, void (*kernel)(Params...), const Args&... args) {
#if defined(__CUDACC__)
  constexpr int kDefaultShared = 48 << 10;
  if (l.shared_bytes > kDefaultShared) {
    const auto error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, l.shared_bytes);
    if (error != cudaSuccess) return message(l, error);
  }
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
  return message(l, cudaLaunchKernelEx(&config, kernel, args...));
#else
  (void)stream;
  simt::launch(l.blocks, l.threads, l.shared_bytes, l.cluster, [&] { kernel(args...); });
  return nullptr;
#endif
}

// major * 10 + minor of the current device. Cached by the driver: no synchronisation.
inline cudaError_t current_arch(int& arch) {
#if defined(__CUDACC__)
  int device = 0, major = 0, minor = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  arch = major * 10 + minor;
  return error;
#else
  arch = simt::arch;
  return cudaSuccess;
#endif
}

}  // namespace fused_rmsnorm::cuda
