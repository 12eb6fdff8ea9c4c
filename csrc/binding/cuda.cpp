// The CUDA backend: the kernels on torch's current stream. It uses torch's device-generic headers
// only, so that it also builds against a torch without CUDA.
#include <c10/core/DeviceGuard.h>
#include <c10/core/impl/VirtualGuardImpl.h>

#include "backend.h"

namespace fused_rmsnorm {
namespace {

void* current_stream() {
  const c10::impl::VirtualGuardImpl impl(c10::DeviceType::CUDA);
  return impl.getStream(impl.getDevice()).native_handle();
}

void check(const char* error) { TORCH_CHECK(error == nullptr, "fused_rmsnorm: ", error); }

struct Cuda {
  struct Guard {
    explicit Guard(const Tensor& t) : device(t.device()) {}
    c10::DeviceGuard device;
  };
  static int64_t workspace(const Backward& args) { return cuda::backward_workspace(args); }
  static void run(const Forward& args) { check(cuda::forward(args, current_stream())); }
  static void run(const Backward& args) { check(cuda::backward(args, current_stream())); }
};

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(CUDA, m) { register_backend<Cuda>(m); }

}  // namespace fused_rmsnorm
