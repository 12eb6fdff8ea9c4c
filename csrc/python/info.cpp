// fused_rmsnorm._info: what this build is, and the launch plan of the CUDA kernels. No tensors.
#include <pybind11/pybind11.h>

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

}  // namespace

PYBIND11_MODULE(_info, m) {
  m.def("build_info", build_info);
}
