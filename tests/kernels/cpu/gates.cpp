// The activations of the gates as the kernels compute them, over numbers of every exponent: against fp64,
// and the same bits from every instruction set that has a fused multiply-add.
//
// Rows of ones are their own norm under rstd = 1, so y is act(z) itself, and dz under a gradient of ones is
// act'(z). For z from 17 on, where sigmoid(z) is 1, sigmoid'(z) is exp(-z) as it was computed.
#include <cstdio>

#include "../activations.h"
#include "here.h"

using namespace fused_rmsnorm;
using namespace fused_rmsnorm::test;

namespace {

constexpr int64_t kColumns = 4096;  // a row: its sum of ones is exact
struct Activated {
  Array value, slope;
};

Activated activate(const cpu::Kernels& kernels, const Array& z, int64_t rows, bool sigmoid) {
  Array ones(Dtype::f32, rows * kColumns), dx(Dtype::f32, rows * kColumns), rstd(Dtype::f32, rows);
  for (int64_t i = 0; i < ones.count(); ++i) ones.set(i, 1);
  for (int64_t m = 0; m < rows; ++m) rstd.set(m, 1);
  Activated result{Array(Dtype::f32, rows * kColumns), Array(Dtype::f32, rows * kColumns)};
  const auto rows_of = [](const Array& a) { return Rows{a.data(), 1, kColumns, 0}; };
  Forward f;
  f.rows = rows, f.n = f.k = kColumns;
  f.x = rows_of(ones), f.z = rows_of(z), f.y = result.value.data();
  f.gate = Gate::last, f.sigmoid = sigmoid;
  kernels.forward(f, 0, rows, false);
  Backward b;
  b.rows = rows, b.n = b.k = kColumns;
  b.x = b.dy = rows_of(ones), b.z = rows_of(z), b.rstd = rstd.data();
  b.dx = dx.data(), b.dz = result.slope.data();
  b.gate = Gate::last, b.sigmoid = sigmoid;
  const cpu::Chunks chunks = cpu::plan(b);
  kernels.backward(b, chunks, 0, chunks.count, false);
  return result;
}

bool same(double a, double b) { return a == b || (std::isnan(a) && std::isnan(b)); }

}  // namespace

// gates STEP: every STEPth number, by its bits. A prime shows all last digits.
int main(int argc, char** argv) {
  Checker check;
  const uint32_t step = argc > 1 ? std::strtoul(argv[1], nullptr, 10) : 1;
  const int64_t rows = (int64_t{1} << 32) / step / kColumns + 1;
  Array z(Dtype::f32, rows * kColumns);
  for (int64_t i = 0; i < z.count(); ++i) {
    const uint32_t bits = static_cast<uint32_t>(i) * step;
    std::memcpy(z.data() + 4 * i, &bits, 4);
  }
  for (const bool sigmoid : {false, true}) {
    const Activated best = activate(*kernels_here().back(), z, rows, sigmoid);
    for (const cpu::Kernels* kernels : kernels_here()) {
      const Activated found = activate(*kernels, z, rows, sigmoid);
      for (int64_t i = 0; i < z.count(); ++i) {
        check_activation(check, z[i], found.value[i], found.slope[i], sigmoid, kernels->name);
      }
#if defined(__x86_64__)
      if (kernels == &cpu::baseline_kernels) continue;
#endif
      for (int64_t i = 0; i < z.count(); ++i) {
        check.that(same(best.value[i], found.value[i]) && same(best.slope[i], found.slope[i]), [&] {
          return std::string(kernels->name) + " has other bits for " + std::to_string(z[i]);
        });
      }
    }
  }
  std::printf("failures: %lld\n", static_cast<long long>(check.failures()));
  return check.failures() ? 1 : 0;
}
