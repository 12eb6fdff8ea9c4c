// Plain and non-temporal copies in the threads of torch's own OpenMP pool: what a kernel that moves
// the same bytes can reach. Compiled by copies.py on the machine that is measured; the extension
// does not contain it.
#include <cstddef>
#include <cstring>
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace {

constexpr std::size_t kStep = 128;
// Fewer bytes: one thread, as torch does below 32768 elements.
constexpr std::size_t kParallel = std::size_t{1} << 17;

template <class Copy>
void in_parts(char* to, const char* from, std::size_t bytes, int threads, Copy copy) {
  if (bytes < kParallel) threads = 1;
  const std::size_t part = (bytes / threads + kStep - 1) / kStep * kStep;
#pragma omp parallel for num_threads(threads) if (threads > 1)
  for (int i = 0; i < threads; ++i) {
    const std::size_t start = i * part;
    if (start < bytes) {
      const bool last = i == threads - 1 || start + part > bytes;
      copy(to + start, from + start, last ? bytes - start : part);
    }
  }
}

}  // namespace

extern "C" void plain_copy(char* to, const char* from, std::size_t bytes, int threads) {
  in_parts(to, from, bytes, threads,
           [](char* to, const char* from, std::size_t bytes) { std::memcpy(to, from, bytes); });
}

#if defined(__x86_64__)
// to must be aligned to 16 bytes.
extern "C" void nt_copy(char* to, const char* from, std::size_t bytes, int threads) {
  constexpr std::size_t kAhead = 4096;  // into L2: up to 15 % faster than 2048 into L1
  in_parts(to, from, bytes, threads, [](char* to, const char* from, std::size_t bytes) {
    std::size_t i = 0;
    for (; i + kStep <= bytes; i += kStep) {
      _mm_prefetch(from + i + kAhead, _MM_HINT_T1);
      _mm_prefetch(from + i + kAhead + 64, _MM_HINT_T1);
      for (std::size_t j = i; j < i + kStep; j += 16) {
        const auto value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
        _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), value);
      }
    }
    std::memcpy(to + i, from + i, bytes - i);
    _mm_sfence();
  });
}
#endif
