// fused_rmsnorm._info: what this build is, and the launch plan of the CUDA kernels. No tensors.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <map>
#include <optional>
#include <string>

#include "cuda/plan.h"
#include "norm.h"

namespace py = pybind11;
using fused_rmsnorm::Dtype;

namespace {

py::dict build_info() {
  const auto or_none = [](const char* s) { return *s ? py::object(py::str(s)) : py::object(py::none()); };
  py::dict info;
  info["version"] = FUSED_RMSNORM_VERSION;
  info["cpu_capability"] = fused_rmsnorm::cpu::capability();
  info["cuda"] = !*FUSED_RMSNORM_CUDA_REASON;
  info["cuda_reason"] = or_none(FUSED_RMSNORM_CUDA_REASON);
  info["cuda_version"] = or_none(FUSED_RMSNORM_CUDA_VERSION);
  info["cub_version"] = or_none(FUSED_RMSNORM_CUB_VERSION);
  info["cuda_archs"] = or_none(FUSED_RMSNORM_CUDA_ARCHS);
  return info;
}

Dtype parse(const char* argument, const std::string& dtype) {
  static const std::map<std::string, Dtype> dtypes = {
      {"float32", Dtype::f32}, {"float16", Dtype::f16}, {"bfloat16", Dtype::bf16}, {"float64", Dtype::f64}};
  const auto found = dtypes.find(dtype);
  if (found == dtypes.end()) {
    throw py::value_error(std::string(argument) + " must be float32, float16, bfloat16 or float64, but got " +
                          dtype);
  }
  return found->second;
}

// The launch of the forward or the backward on architecture major * 10 + minor.
// grad_dtype, of dy, is wider than x's in llama mode with a wide weight.
py::dict launch_plan(int64_t n, const std::string& dtype, int arch, bool backward,
                     const std::optional<std::string>& grad_dtype) {
  namespace cuda = fused_rmsnorm::cuda;
  // Bytes of a row are counted in 64 bits: no device has addresses for more.
  if (n < 1 || n > int64_t{1} << 48) {
    throw py::value_error("n must be at least 1 and at most 2**48, but got " + std::to_string(n));
  }
  const Dtype x = parse("dtype", dtype), dy = grad_dtype ? parse("grad_dtype", *grad_dtype) : x;
  if (size_of(dy) < size_of(x)) throw py::value_error("grad_dtype must not be narrower than dtype");
  const cuda::Plan p = backward ? cuda::backward_plan(n, x, dy, arch) : cuda::forward_plan(n, x, arch);
  static const char* const families[] = {"registers", "cluster", "two_pass"};
  py::dict plan;
  plan["family"] = families[static_cast<int>(p.family)];
  plan["vector"] = p.vector;
  plan["threads"] = p.threads;
  plan["items"] = p.items;
  plan["rows_per_block"] = p.rows_per_block;
  plan["cluster"] = p.cluster;
  plan["stages"] = p.stages;
  plan["shared_bytes"] = p.shared_bytes;
  plan["max_grid"] = p.max_grid;
  return plan;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.def("build_info", build_info, "What this build is: versions, instruction set in use, CUDA or why not.");
  m.def("launch_plan", launch_plan, py::arg("n"), py::arg("dtype") = "bfloat16", py::arg("arch") = 90,
        py::arg("backward") = false, py::arg("grad_dtype") = py::none(),
        "How the CUDA kernels are launched for rows of n elements.");
}
