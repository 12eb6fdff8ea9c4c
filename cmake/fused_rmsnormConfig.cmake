# find_package(fused_rmsnorm): target fused_rmsnorm::fused_rmsnorm. Pass TORCH_ROOT, the folder of
# the torch package, unless a Python interpreter that has it can be found.
include(${CMAKE_CURRENT_LIST_DIR}/torch.cmake)
include(${CMAKE_CURRENT_LIST_DIR}/targets.cmake)
