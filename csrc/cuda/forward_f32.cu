#include "forward.cuh"

template const char* fused_rmsnorm::cuda::forward_of<float>(const Forward&, const Plan&, void*);
