# add_torch(ROOT MINOR): target torch-<minor> for the torch package in the folder ROOT, its headers and
# libraries; sets MINOR, e.g. to 2.13. Unlike find_package(Torch) this needs no CUDA toolkit beyond what
# the package was built for, so that the CUDA half builds against a CPU-only torch, too.
#
# TORCH_ROOT, if it is not given, is the torch of the Python interpreter that CMake finds.
if(NOT TORCH_ROOT)
  find_package(Python REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import torch, os; print(os.path.dirname(torch.__file__))"
    OUTPUT_VARIABLE TORCH_ROOT OUTPUT_STRIP_TRAILING_WHITESPACE COMMAND_ERROR_IS_FATAL ANY)
endif()
set(TORCH_ROOT "${TORCH_ROOT}" CACHE PATH "Folder of the torch package")

function(add_torch root minor)
  file(STRINGS ${root}/version.py version REGEX "^__version__")
  string(REGEX REPLACE ".*'([^']*)'.*" "\\1" version "${version}")
  if(version VERSION_LESS 2.11)
    message(FATAL_ERROR "fused_rmsnorm needs torch >= 2.11, but ${root} holds ${version}")
  endif()
  string(REGEX MATCH "^[0-9]+\\.[0-9]+" number "${version}")
  set(${minor} ${number} PARENT_SCOPE)
  set(target torch-${number})
  if(TARGET ${target})
    return()
  endif()
  add_library(${target} INTERFACE IMPORTED GLOBAL)
  set_target_properties(${target} PROPERTIES TORCH_ROOT ${root} TORCH_VERSION ${version})
  target_include_directories(${target} SYSTEM INTERFACE
    ${root}/include ${root}/include/torch/csrc/api/include)
  # By their paths, so that a program's build finds them when it runs. Operators register themselves:
  # nothing refers to libtorch by symbol, so the linker must not drop it.
  target_link_libraries(${target} INTERFACE -Wl,--no-as-needed
    ${root}/lib/libtorch.so ${root}/lib/libtorch_cpu.so ${root}/lib/libc10.so)
endfunction()
