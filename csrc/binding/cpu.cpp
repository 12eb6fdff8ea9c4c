// The CPU backend: the kernels over torch's threads.
#include <torch/csrc/stable/c/shim.h>

#include "backend.h"

namespace fused_rmsnorm {
namespace {

// at::parallel_for of [0, end), run inside of torch. The one in torch's headers needs -fopenmp here (and is
// silently serial without) and, from clang, another OpenMP runtime than the one that torch loads.
template <class Work>
void parallel_for(int64_t end, int64_t grain, const Work& work) {
  const auto run = [](int64_t first, int64_t last, void* context) {
    (*static_cast<const Work*>(context))(first, last);
  };
  TORCH_CHECK(torch_parallel_for(0, end, grain, run, const_cast<Work*>(&work)) == AOTI_TORCH_SUCCESS);
}

struct Cpu {
  struct Guard {
    explicit Guard(const Tensor&) {}
  };
  static int64_t workspace(const Backward& args) { return cpu::backward_workspace(args); }

  static void run(const Forward& args) {
    parallel_for(args.rows, cpu::forward_grain(args),
                 [&](int64_t begin, int64_t end) { cpu::forward(args, begin, end); });
  }

  static void run(const Backward& args) {
    parallel_for(cpu::backward_chunks(args), cpu::backward_grain(args),
                 [&](int64_t begin, int64_t end) { cpu::backward(args, begin, end); });
    if (!args.dw && !args.db) return;
    constexpr int64_t kColumns = 2048;  // with fewer, a second thread costs more than it saves
    parallel_for(args.weight_rows * args.n, kColumns,
                 [&](int64_t begin, int64_t end) { cpu::backward_merge(args, begin, end); });
  }
};

}  // namespace

FUSED_RMSNORM_LIBRARY_IMPL(CPU, m) { register_backend<Cpu>(m); }

}  // namespace fused_rmsnorm
