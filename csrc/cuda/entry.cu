// The entry points of norm.h: plan, then the translation unit of x's dtype.
#include "device.cuh"
#include "rows.h"
#include "run.h"

namespace fused_rmsnorm::cuda {

template <class X>
const char* forward_of(const Forward& f, const Plan& p, void* stream);
template <class X>
const char* backward_of(const Backward& b, const Plan& p, void* stream);

namespace {

constexpr int64_t kMaxColumns = int64_t{1} << 30;  // columns are counted in 32 bits

// 0 is added to a weight as -0, which changes no number: +0 would change the sign of a weight of -0, in those
// kernels alone that add it.
double added_offset(double offset) { return offset == 0 ? -0.0 : offset; }

// nullptr, or why the kernels cannot find these rows.
template <class... Tensor>
const char* place_rows(int64_t count, Tensor&... tensors) {
  ((tensors = with_places(tensors, count)), ...);
  return (has_places(tensors) && ...) ? nullptr
                                      : "more than 2^31 rows with two strides are not supported on CUDA";
}

}  // namespace

const char* run(const Forward& call, const Plan& p, void* stream) {
  Forward f = call;
  f.weight_offset = added_offset(f.weight_offset);
  if (const char* error = place_rows(f.rows, f.x, f.residual, f.z)) return error;
  switch (f.x_dtype) {
    case Dtype::f32:
      return forward_of<float>(f, p, stream);
    case Dtype::f64:
      return forward_of<double>(f, p, stream);
    case Dtype::f16:
      return forward_of<__half>(f, p, stream);
    case Dtype::bf16:
      return forward_of<__nv_bfloat16>(f, p, stream);
  }
  return "unknown dtype";
}

const char* run(const Backward& call, const Plan& p, void* stream) {
  Backward b = call;
  b.weight_offset = added_offset(b.weight_offset);
  if (const char* error = place_rows(b.rows, b.x, b.dy, b.dsum, b.z)) return error;
  switch (b.x_dtype) {
    case Dtype::f32:
      return backward_of<float>(b, p, stream);
    case Dtype::f64:
      return backward_of<double>(b, p, stream);
    case Dtype::f16:
      return backward_of<__half>(b, p, stream);
    case Dtype::bf16:
      return backward_of<__nv_bfloat16>(b, p, stream);
  }
  return "unknown dtype";
}

const char* forward(const Forward& f, void* stream) {
  if (f.rows == 0) return nullptr;
  if (f.n > kMaxColumns) return "rows of more than 2^30 elements are not supported on CUDA";
  int arch = 0;
  if (const char* error = message({"device query", 0, 0, 0, 0}, current_arch(arch))) return error;
  return run(f, plan_of(f, arch), stream);
}

int64_t backward_workspace(const Backward& b) {
  int arch = 0;
  if (current_arch(arch) != cudaSuccess) return 0;  // backward reports it
  const int64_t partials = partials_of(plan_of(b, arch), b.rows, b.weight_rows) * b.weight_rows;
  return partials * partial_stride(b.n) * ((b.dw != nullptr) + (b.db != nullptr)) *
         (b.x_dtype == Dtype::f64 ? 8 : 4);
}

const char* backward(const Backward& b, void* stream) {
  if (b.n > kMaxColumns) return "rows of more than 2^30 elements are not supported on CUDA";
  int arch = 0;
  if (const char* error = message({"device query", 0, 0, 0, 0}, current_arch(arch))) return error;
  return run(b, plan_of(b, arch), stream);
}

}  // namespace fused_rmsnorm::cuda
