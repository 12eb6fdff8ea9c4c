// A call under a given launch plan. The entry points of norm.h make the plan themselves; tests pass
// one with a small grid, so that few rows suffice for every block to take several.
#pragma once
#include "plan.h"

namespace fused_rmsnorm::cuda {

const char* run(const Forward& f, const Plan& p, void* stream);
const char* run(const Backward& b, const Plan& p, void* stream);

}  // namespace fused_rmsnorm::cuda
