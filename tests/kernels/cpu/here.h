// The kernels that this machine can run.
#pragma once
#include <cstring>
#include <vector>

#include "../../../csrc/cpu/kernels.h"

namespace fused_rmsnorm::test {

// The best last. name: of the only ones wanted, if any.
inline std::vector<const cpu::Kernels*> kernels_here(const char* name = nullptr) {
  std::vector<const cpu::Kernels*> all;
  for (const cpu::Kernels* k : {
           &cpu::baseline_kernels,
#if defined(__x86_64__)
           &cpu::avx2_kernels,
           &cpu::avx512_kernels,
#elif defined(__aarch64__)
           &cpu::neon_kernels,
#endif
       }) {
    if (cpu::supported(*k) && (!name || std::strcmp(name, k->name) == 0)) all.push_back(k);
  }
  return all;
}

}  // namespace fused_rmsnorm::test
