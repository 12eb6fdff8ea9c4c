# The CPU kernels: CPU_SOURCES and the CPU_OPTIONS they are all compiled with. Used by the build and by
# tests/kernels/cpu, which compiles the same sources once more under sanitizers.
#
# One file per instruction set, with the flags that only it may have; dispatch.cpp, compiled without
# any, chooses between them at load.
cmake_path(ABSOLUTE_PATH CMAKE_CURRENT_LIST_DIR NORMALIZE OUTPUT_VARIABLE CPU_FOLDER)
cmake_path(GET CPU_FOLDER PARENT_PATH CPU_FOLDER)
string(APPEND CPU_FOLDER /csrc/cpu)
set(CPU_SOURCES ${CPU_FOLDER}/dispatch.cpp ${CPU_FOLDER}/kernels_baseline.cpp)
# Multiply-adds are written where they are wanted: results must not hang on what a compiler fuses.
set(CPU_OPTIONS -O3 -Wall -Wextra -ffp-contract=off)
# Half the time of -O3 to compile, and 3 % more instructions (fp32: 13), on processors of before 2013.
set_source_files_properties(${CPU_FOLDER}/kernels_baseline.cpp PROPERTIES
  COMPILE_OPTIONS "-fno-math-errno;-O1;-fgcse;-fcaller-saves;-Wno-ignored-optimization-argument")
if(CMAKE_SYSTEM_PROCESSOR MATCHES "x86_64|AMD64|amd64")
  list(APPEND CPU_SOURCES ${CPU_FOLDER}/kernels_avx2.cpp ${CPU_FOLDER}/kernels_avx512.cpp)
  set_source_files_properties(${CPU_FOLDER}/kernels_avx2.cpp PROPERTIES
    COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-Wno-uninitialized")
  set_source_files_properties(${CPU_FOLDER}/kernels_avx512.cpp PROPERTIES
    COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mfma;-mf16c;-Wno-uninitialized")
elseif(CMAKE_SYSTEM_PROCESSOR MATCHES "aarch64|arm64|ARM64")
  list(APPEND CPU_SOURCES ${CPU_FOLDER}/kernels_neon.cpp)
endif()
# For tests that build around them: they take a minute to compile.
set(FUSED_RMSNORM_CPU_OBJECTS "" CACHE STRING "these kernels, compiled already with these options")
if(FUSED_RMSNORM_CPU_OBJECTS)
  set(CPU_SOURCES ${FUSED_RMSNORM_CPU_OBJECTS})
endif()
