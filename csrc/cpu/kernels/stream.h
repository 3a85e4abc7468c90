// Streaming (non-temporal) stores, which leave the caches alone. A plain store first fetches the line that it
// overwrites; for a result too large for the caches that is a third of the traffic. Included by kernel files only (see
// vec.h).
#pragma once
#include <type_traits>

#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {

constexpr int64_t kStreamBytes = 16 << 20;

// Whether a dense tensor of `total` elements is to be streamed: it is large, and a vector that starts at any multiple
// of `row` elements, or whole vectors after that, is aligned. A kernel that streamed calls stream_fence() before it
// returns.
SANA_EXT_INLINE bool streams(Ptr p, int64_t row, int64_t total) {
#if defined(__SSE2__)
  return p.dtype == Dtype::kFloat32 && total * 4 >= kStreamBytes && row % 16 == 0 &&
         reinterpret_cast<uintptr_t>(p.data) % 64 == 0;
#else
  (void)p, (void)row, (void)total;
  return false;
#endif
}
template <class T, class V>
SANA_EXT_INLINE void stream(T* p, V v) {
#if defined(__AVX512F__)
  if constexpr (std::is_same_v<T, float>) return _mm512_stream_ps(p, (__m512)v);
#elif defined(__AVX2__)
  if constexpr (std::is_same_v<T, float>) return _mm256_stream_ps(p, (__m256)v);
#elif defined(__SSE2__)
  if constexpr (std::is_same_v<T, float>) return _mm_stream_ps(p, (__m128)v);
#endif
  store(p, v);
}
SANA_EXT_INLINE void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
