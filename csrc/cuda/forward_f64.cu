#include "forward.cuh"

template const char* fused_rmsnorm::cuda::forward_of<double>(const Forward&, const Plan&, void*);
