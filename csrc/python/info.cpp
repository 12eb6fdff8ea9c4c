// fused_rmsnorm._info: what this build is, and the launch plan of the CUDA kernels. No tensors.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

#include "cuda/plan.h"
#include "norm.h"

namespace py = pybind11;

namespace {

py::dict build_info() {
  const auto or_none = [](const char* s) { return *s ? py::object(py::str(s)) : py::object(py::none()); };
  py::dict info;
  info["version"] = FUSED_RMSNORM_VERSION;
  info["torch"] = FUSED_RMSNORM_TORCH_VERSION;
  info["cpu_capability"] = fused_rmsnorm::cpu::capability();
  info["cuda"] = !*FUSED_RMSNORM_CUDA_REASON;
  info["cuda_reason"] = or_none(FUSED_RMSNORM_CUDA_REASON);
  info["cuda_version"] = or_none(FUSED_RMSNORM_CUDA_VERSION);
  info["cub_version"] = or_none(FUSED_RMSNORM_CUB_VERSION);
  info["cuda_archs"] = or_none(FUSED_RMSNORM_CUDA_ARCHS);
  return info;
}

// The launch of the forward or the backward on architecture major * 10 + minor.
py::dict launch_plan(int64_t n, const std::string& dtype, int arch, bool backward) {
  using fused_rmsnorm::Dtype;
  static const std::map<std::string, Dtype> dtypes = {
      {"float32", Dtype::f32}, {"float16", Dtype::f16}, {"bfloat16", Dtype::bf16}, {"float64", Dtype::f64}};
  const auto found = dtypes.find(dtype);
  if (found == dtypes.end()) {
    throw py::value_error("dtype must be float32, float16, bfloat16 or float64, but got " + dtype);
  }
  if (n < 1) throw py::value_error("n must be at least 1, but got " + std::to_string(n));
  namespace cuda = fused_rmsnorm::cuda;
  const cuda::Plan p = backward ? cuda::backward_plan(n, found->second, found->second, arch)
                                : cuda::forward_plan(n, found->second, arch);
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
  plan["partials"] = p.partials;
  return plan;
}

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.def("build_info", build_info, "What this build is: versions, instruction set in use, CUDA or why not.");
  m.def("launch_plan", launch_plan, py::arg("n"), py::arg("dtype") = "bfloat16", py::arg("arch") = 90,
        py::arg("backward") = false, "How the CUDA kernels are launched for rows of n elements.");
}
