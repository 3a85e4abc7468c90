// The 8-bit block codes in whole vectors: what csrc/common/code8.h says, bit by bit. Included by kernel files only (see
// vec.h).
#pragma once
#include "../../common/code8.h"
#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {

constexpr DynamicCode kSignedCode = make_dynamic_code(true), kUnsignedCode = make_dynamic_code(false);

struct SignedTable {
  float value[256];
};
constexpr SignedTable make_signed_table() {
  SignedTable t{};
  for (int i = 0; i < 256; ++i)
    t.value[i] = i >= kCodeZero ? kSignedCode.magnitude[i - kCodeZero] : -kSignedCode.magnitude[kCodeZero - i];
  return t;
}
constexpr SignedTable kSignedTable = make_signed_table();

typedef uint8_t Bytes __attribute__((vector_size(kLanes)));

// Compilers convert vectors of bytes one by one.
SANA_EXT_INLINE Vec<int32_t> load_bytes(const uint8_t* p) {
#if defined(__AVX512F__)
  return (Vec<int32_t>)_mm512_cvtepu8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__AVX2__)
  return (Vec<int32_t>)_mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
#else
  Bytes bytes;
  std::memcpy(&bytes, p, sizeof bytes);
  return __builtin_convertvector(bytes, Vec<int32_t>);
#endif
}
// v: 0..255.
SANA_EXT_INLINE void store_bytes(uint8_t* p, Vec<int32_t> v) {
#if defined(__AVX512F__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8((__m512i)v));
#elif defined(__AVX2__)
  const __m256i words = _mm256_packus_epi32((__m256i)v, (__m256i)v);  // each half by itself
  const __m256i bytes = _mm256_packus_epi16(words, words);
  const __m128i low = _mm256_castsi256_si128(bytes), high = _mm256_extracti128_si256(bytes, 1);
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_unpacklo_epi32(low, high));
#else
  const Bytes bytes = __builtin_convertvector(v, Bytes);
  std::memcpy(p, &bytes, sizeof bytes);
#endif
}

SANA_EXT_INLINE Vec<float> look_up(const float* table, Vec<int32_t> index) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_i32gather_ps((__m512i)index, table, 4);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_i32gather_ps(table, (__m256i)index, 4);
#else
  Vec<float> v;
  for (int i = 0; i < kLanes; ++i) v[i] = table[index[i]];
  return v;
#endif
}
// The same for a table of 8.
SANA_EXT_INLINE Vec<float> look_up8(const float* table, Vec<int32_t> index) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_permutexvar_ps((__m512i)index, _mm512_castps256_ps512(_mm256_loadu_ps(table)));
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_permutevar8x32_ps(_mm256_loadu_ps(table), (__m256i)index);
#else
  return look_up(table, index);
#endif
}

SANA_EXT_INLINE Vec<int32_t> round_to_int(Vec<float> x) {  // halves to even
#if defined(__AVX512F__)
  return (Vec<int32_t>)_mm512_cvtps_epi32((__m512)x);
#elif defined(__AVX2__)
  return (Vec<int32_t>)_mm256_cvtps_epi32((__m256)x);
#elif defined(__x86_64__)
  return (Vec<int32_t>)_mm_cvtps_epi32((__m128)x);
#elif defined(__aarch64__)
  return (Vec<int32_t>)vcvtnq_s32_f32((float32x4_t)x);
#else
  Vec<int32_t> v;
  for (int i = 0; i < kLanes; ++i) v[i] = static_cast<int32_t>(__builtin_rintf(x[i]));
  return v;
#endif
}

// Index of the magnitude nearest to a, which is finite.
SANA_EXT_INLINE Vec<int32_t> encode_magnitude(const DynamicCode& t, Vec<float> a) {
  Vec<int32_t> decade{};
  for (int d = 0; d < kCodeDecades; ++d) decade -= a > t.decade[d];  // a comparison is -1 where it holds
  const Vec<float> line = a * look_up8(t.slope, decade) + look_up8(t.offset, decade), last = look_up8(t.last, decade);
  const Vec<float> capped = line < last ? line : last;
  const Vec<int32_t> k = __builtin_convertvector(capped, Vec<int32_t>);
  return k - (a > look_up(t.border, k));
}
SANA_EXT_INLINE Vec<int32_t> encode_signed(Vec<float> x) {
  const Vec<int32_t> k = encode_magnitude(kSignedCode, x < 0.0f ? -x : x);
  const Vec<int32_t> zero = Vec<int32_t>{} + kCodeZero;
  return x < 0.0f ? zero - (k < zero ? k : zero) : zero + k;
}
SANA_EXT_INLINE Vec<int32_t> encode_unsigned(Vec<float> value, float inverse) {
  const Vec<int32_t> k = encode_magnitude(kUnsignedCode, value * inverse);
  return k - ((k == 0) & (value > 0.0f));
}

// One block of n values: codes -> values.
inline void decode_block(const uint8_t* codes, const float* scales, bool linear, int64_t n, float* values) {
  int64_t i = 0;
  if (linear) {
    const float low = scales[0], step = scales[1];
    const Vec<float> least = broadcast(step * kLinearRounding);
    for (; i + kLanes <= n; i += kLanes) {
      const Vec<float> value = __builtin_convertvector(load_bytes(codes + i), Vec<float>) * step + low;
      store(values + i, (value < least) & (value > -least) ? Vec<float>{} : value);
    }
    for (; i < n; ++i) values[i] = decode_linear(codes[i], low, step);
    return;
  }
  for (; i + kLanes <= n; i += kLanes)
    store(values + i, look_up(kSignedTable.value, load_bytes(codes + i)) * scales[0]);
  for (; i < n; ++i) values[i] = kSignedTable.value[codes[i]] * scales[0];
}

// One block of n > 0 values: values -> codes and scales. Makes the values finite, in place.
inline void encode_block(float* values, bool linear, int64_t n, uint8_t* codes, float* scales) {
  Vec<float> lows = broadcast(kCodeLargest), highs = -lows;
  float low = kCodeLargest, high = -kCodeLargest;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    Vec<float> x = load(values + i);
    x = x == x ? x : Vec<float>{};
    x = x > kCodeLargest ? broadcast(kCodeLargest) : x < -kCodeLargest ? broadcast(-kCodeLargest) : x;
    store(values + i, x);
    lows = x < lows ? x : lows;
    highs = x > highs ? x : highs;
  }
  for (; i < n; ++i) {
    const float x = values[i] = saturated(values[i]);
    low = x < low ? x : low;
    high = x > high ? x : high;
  }
  for (int lane = 0; lane < kLanes; ++lane) {
    low = lows[lane] < low ? lows[lane] : low;
    high = highs[lane] > high ? highs[lane] : high;
  }
  i = 0;
  if (linear) {
    const float step = linear_step(low, high), inverse = code_inverse(step);
    low = linear_low(low, high, step);
    scales[0] = low, scales[1] = step;
    for (; i + kLanes <= n; i += kLanes) {
      Vec<int32_t> code = round_to_int((load(values + i) - low) * inverse);
      code = code > 255 ? Vec<int32_t>{} + 255 : code < 0 ? Vec<int32_t>{} : code;
      store_bytes(codes + i, code);
    }
    for (; i < n; ++i) codes[i] = encode_linear(values[i], low, inverse);
    return;
  }
  const float scale = code_scale(high > -low ? high : -low), inverse = code_inverse(scale);
  scales[0] = scale;
  for (; i + kLanes <= n; i += kLanes) store_bytes(codes + i, encode_signed(load(values + i) * inverse));
  for (; i < n; ++i) codes[i] = sana_ext::encode_signed(kSignedCode, values[i] * inverse);
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
