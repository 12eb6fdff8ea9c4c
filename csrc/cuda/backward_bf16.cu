#include "backward.cuh"

template const char* fused_rmsnorm::cuda::backward_of<__nv_bfloat16>(const Backward&, const Plan&, void*);
