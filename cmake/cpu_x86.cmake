# One file per instruction set, with the flags that only it may have; csrc/cpu/dispatch.cpp, compiled
# without any, chooses between them at load.
list(APPEND CPU_SOURCES csrc/cpu/kernels_avx2.cpp csrc/cpu/kernels_avx512.cpp)
set_source_files_properties(csrc/cpu/kernels_baseline.cpp PROPERTIES COMPILE_OPTIONS -fno-math-errno)
set_source_files_properties(csrc/cpu/kernels_avx2.cpp PROPERTIES COMPILE_OPTIONS "-mavx2;-mfma;-mf16c;-Wno-uninitialized")
set_source_files_properties(csrc/cpu/kernels_avx512.cpp PROPERTIES
  COMPILE_OPTIONS "-mavx512f;-mavx512bw;-mavx512vl;-mavx512dq;-mfma;-mf16c;-Wno-uninitialized")
