#include "backward.cuh"

template const char* fused_rmsnorm::cuda::backward_of<__half>(const Backward&, const Plan&, void*);
