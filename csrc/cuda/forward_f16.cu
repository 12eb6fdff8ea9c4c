#include "forward.cuh"

template const char* fused_rmsnorm::cuda::forward_of<__half>(const Forward&, const Plan&, void*);
