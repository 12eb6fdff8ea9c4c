// The one place that names the operators' namespace: torch.ops.<TORCH_EXTENSION_NAME>.
//
// Two builds in one process need two names, for torch refuses a second registration. Such a build
// passes its own -DTORCH_EXTENSION_NAME=..., as Hugging Face's kernel-builder does for every build; the
// Python side has the name in python/fused_rmsnorm/_ops.py.
#pragma once
#include <torch/library.h>

#ifndef TORCH_EXTENSION_NAME
#define TORCH_EXTENSION_NAME fused_rmsnorm
#endif

// torch's macros paste their argument as it is written; through these the name is put in first.
#define FUSED_RMSNORM_EXPAND(MACRO, ...) MACRO(__VA_ARGS__)
#define FUSED_RMSNORM_LIBRARY(module) FUSED_RMSNORM_EXPAND(TORCH_LIBRARY, TORCH_EXTENSION_NAME, module)
#define FUSED_RMSNORM_LIBRARY_IMPL(key, module) \
  FUSED_RMSNORM_EXPAND(TORCH_LIBRARY_IMPL, TORCH_EXTENSION_NAME, key, module)

// "<namespace>", to be put before "::name".
#define FUSED_RMSNORM_NAMESPACE C10_STRINGIZE(TORCH_EXTENSION_NAME)
