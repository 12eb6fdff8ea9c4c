#include "backward.cuh"

template const char* fused_rmsnorm::cuda::backward_of<double>(const Backward&, const Plan&, void*);
