# find_package(fused_rmsnorm): target fused_rmsnorm::fused_rmsnorm, for the torch in TORCH_ROOT, the
# folder of the torch package. Pass it, unless a Python interpreter that has torch can be found.
include(${CMAKE_CURRENT_LIST_DIR}/torch.cmake)
add_torch(${TORCH_ROOT} fused_rmsnorm_TORCH)
if(EXISTS ${CMAKE_CURRENT_LIST_DIR}/torch-${fused_rmsnorm_TORCH}.cmake)
  include(${CMAKE_CURRENT_LIST_DIR}/kernels.cmake)
  include(${CMAKE_CURRENT_LIST_DIR}/torch-${fused_rmsnorm_TORCH}.cmake)
else()
  file(GLOB built RELATIVE ${CMAKE_CURRENT_LIST_DIR} ${CMAKE_CURRENT_LIST_DIR}/torch-*.cmake)
  list(FILTER built INCLUDE REGEX "^torch-[0-9.]+\\.cmake$")
  string(REGEX REPLACE "torch-([0-9.]*)\\.cmake" "\\1" built "${built}")
  list(JOIN built ", " built)
  set(fused_rmsnorm_FOUND FALSE)
  set(fused_rmsnorm_NOT_FOUND_MESSAGE
    "this fused_rmsnorm is built for torch ${built}, but ${TORCH_ROOT} holds ${fused_rmsnorm_TORCH}")
endif()
