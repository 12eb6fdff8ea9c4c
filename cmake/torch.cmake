# Target torch_headers_and_libs: the torch package's own folder, headers and libraries. Unlike
# find_package(Torch) this needs no CUDA toolkit beyond what the package was built for, so that the
# CUDA half builds against a CPU-only torch, too.
if(NOT TORCH_ROOT)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import torch, os; print(os.path.dirname(torch.__file__))"
    OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
set(TORCH_ROOT "${TORCH_ROOT}" CACHE PATH "Folder of the torch package")
file(STRINGS ${TORCH_ROOT}/version.py TORCH_VERSION REGEX "^__version__")
string(REGEX REPLACE ".*'([^']*)'.*" "\\1" TORCH_VERSION "${TORCH_VERSION}")
if(TORCH_VERSION VERSION_LESS 2.11)
  message(FATAL_ERROR "fused_rmsnorm needs torch >= 2.11, but ${TORCH_ROOT} holds ${TORCH_VERSION}")
endif()

add_library(torch_headers_and_libs INTERFACE IMPORTED GLOBAL)
target_include_directories(torch_headers_and_libs SYSTEM INTERFACE
  ${TORCH_ROOT}/include ${TORCH_ROOT}/include/torch/csrc/api/include)
target_link_directories(torch_headers_and_libs INTERFACE ${TORCH_ROOT}/lib)
# Operators register themselves: nothing refers to libtorch by symbol, so the linker must not drop it.
target_link_libraries(torch_headers_and_libs INTERFACE -Wl,--no-as-needed torch torch_cpu c10)
