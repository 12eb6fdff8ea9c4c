#include "backward.cuh"

template const char* fused_rmsnorm::cuda::backward_of<float>(const Backward&, const Plan&, void*);
