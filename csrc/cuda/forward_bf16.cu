#include "forward.cuh"

template const char* fused_rmsnorm::cuda::forward_of<__nv_bfloat16>(const Forward&, const Plan&, void*);
