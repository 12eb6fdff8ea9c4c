// Runs an AOTInductor package that holds fused_rmsnorm operators. Linking the library is all it
// takes: its operators register themselves when it is loaded.
#include <ATen/ATen.h>
#include <fused_rmsnorm/fused_rmsnorm.h>
#include <torch/csrc/inductor/aoti_package/model_package_loader.h>

#include <cstdio>

// The package holds the module RMSNorm(48) with its weight at 1 and eps 1e-6.
int main(int argc, char** argv) {
  if (argc != 2) return std::fprintf(stderr, "usage: run_package PACKAGE.pt2\n"), 2;
  torch::inductor::AOTIModelPackageLoader loader(argv[1]);
  const at::Tensor x = at::randn({7, 48});
  const at::Tensor got = loader.run({x}).at(0);
  const bool same = at::equal(got, fused_rmsnorm::rms_norm(x, at::ones({48}), {}, {.eps = 1e-6}));
  std::printf("package and library %s\n", same ? "agree" : "DIFFER");
  return same ? 0 : 1;
}
