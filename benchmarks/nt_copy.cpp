// A copy with non-temporal stores: what a kernel that writes past the caches can reach at most.
// Compiled by copies.py on the machine that is measured; the extension does not contain it.
#include <immintrin.h>

#include <cstddef>
#include <cstring>
#include <thread>
#include <vector>

namespace {

constexpr std::size_t kStep = 128;
// 1 to 4 kB ahead all reach the same speed.
constexpr std::size_t kAhead = 2048;

void copy(char* to, const char* from, std::size_t bytes) {
  std::size_t i = 0;
  for (; i + kStep <= bytes; i += kStep) {
    _mm_prefetch(from + i + kAhead, _MM_HINT_T0);
    _mm_prefetch(from + i + kAhead + 64, _MM_HINT_T0);
    for (std::size_t j = i; j < i + kStep; j += 16) {
      const auto value = _mm_loadu_si128(reinterpret_cast<const __m128i*>(from + j));
      _mm_stream_si128(reinterpret_cast<__m128i*>(to + j), value);
    }
  }
  std::memcpy(to + i, from + i, bytes - i);
  _mm_sfence();
}

}  // namespace

// to must be aligned to 16 bytes.
extern "C" void nt_copy(char* to, const char* from, std::size_t bytes, int threads) {
  const std::size_t part = (bytes / threads + kStep - 1) / kStep * kStep;
  std::vector<std::thread> others;
  for (std::size_t start = part; start < bytes; start += part)
    others.emplace_back(copy, to + start, from + start, start + part < bytes ? part : bytes - start);
  copy(to, from, part < bytes ? part : bytes);
  for (auto& t : others) t.join();
}
