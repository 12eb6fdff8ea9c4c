# sanitize(TARGET): under what SANITIZE names, an argument of -fsanitize= or nothing.
set(SANITIZE "" CACHE STRING "argument of -fsanitize=, or nothing")

function(sanitize target)
  if(NOT SANITIZE)
    return()
  endif()
  target_compile_options(${target} PUBLIC -fsanitize=${SANITIZE} -fno-sanitize-recover=all)
  target_link_options(${target} PUBLIC -fsanitize=${SANITIZE})
  # AddressSanitizer's checks by calls, not written out: half the time to compile these sources.
  if(SANITIZE MATCHES "address" AND CMAKE_CXX_COMPILER_ID STREQUAL "GNU")
    target_compile_options(${target} PUBLIC --param=asan-instrumentation-with-call-threshold=0)
  endif()
endfunction()
