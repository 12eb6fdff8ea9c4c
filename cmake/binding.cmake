# add_binding(ROOT): what is built once for every minor version of torch, against the package in the
# folder ROOT. It is thin: the kernels know no torch.
#
#   fused_rmsnorm-<minor>   libfused_rmsnorm.so, the operators (LibTorch, no Python)
#   _eager-<minor>          _eager*.so, the same for Python's eager mode, without torch.ops' overhead
#
# Both are installed into lib/torch-<minor>, where _library.py and fused_rmsnormConfig.cmake look.
function(add_binding root)
  add_torch(${root} minor)
  set(folder lib/torch-${minor})
  set(operators fused_rmsnorm-${minor})
  file(GLOB sources CONFIGURE_DEPENDS csrc/binding/*.cpp)
  if(NOT FUSED_RMSNORM_HAS_CUDA)
    list(FILTER sources EXCLUDE REGEX "/cuda\\.cpp$")
  endif()
  add_library(${operators} SHARED ${sources})
  # torch's headers are nearly all of the work: read once (12 s; ATen/ATen.h took 20), not by every file.
  target_precompile_headers(${operators} PRIVATE <ATen/core/Tensor.h> <torch/library.h>)
  target_link_libraries(${operators} PRIVATE fused_rmsnorm_kernels PUBLIC torch-${minor})
  target_include_directories(${operators} PUBLIC
    $<BUILD_INTERFACE:${CMAKE_CURRENT_SOURCE_DIR}/csrc/include> $<INSTALL_INTERFACE:include>)
  target_compile_options(${operators} PRIVATE -Wall)
  # Else torch's own headers bring in those of all its operators.
  target_compile_definitions(${operators} PRIVATE AT_PER_OPERATOR_HEADERS)
  # In the build folder as in the installed one, beside the kernels; torch is the neighbour of the package.
  set_target_properties(${operators} PROPERTIES
    OUTPUT_NAME fused_rmsnorm EXPORT_NAME fused_rmsnorm
    LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/${folder}
    BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/..;$ORIGIN/../../../torch/lib")
  install(TARGETS ${operators} EXPORT ${operators} LIBRARY DESTINATION ${folder})
  install(EXPORT ${operators} NAMESPACE fused_rmsnorm:: FILE torch-${minor}.cmake
          DESTINATION share/cmake/fused_rmsnorm)

  if(FUSED_RMSNORM_PYTHON)
    set(eager _eager-${minor})
    get_target_property(version torch-${minor} TORCH_VERSION)
    Python_add_library(${eager} MODULE WITH_SOABI csrc/python/eager.cpp)
    target_link_libraries(${eager} PRIVATE ${operators} ${root}/lib/libtorch_python.so)
    target_compile_definitions(${eager} PRIVATE FUSED_RMSNORM_TORCH_VERSION="${version}")
    set_target_properties(${eager} PROPERTIES
      OUTPUT_NAME _eager
      LIBRARY_OUTPUT_DIRECTORY ${PROJECT_BINARY_DIR}/${folder}
      BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN;$ORIGIN/../../../torch/lib")
    install(TARGETS ${eager} LIBRARY DESTINATION ${folder})
  endif()

  # No path of the machine that builds in what is built.
  foreach(target ${operators} ${eager})
    target_compile_options(${target} PRIVATE -ffile-prefix-map=${root}/=torch/)
  endforeach()
endfunction()
