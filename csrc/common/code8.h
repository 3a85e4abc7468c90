// The 8-bit block codes of sana_ext/reference/code8.py for host and device: the same table bit by bit, and the same
// byte for every value, without a search. Torch-free.
#pragma once
#include <cstdint>

#include "math.h"

namespace sana_ext {

// Magnitudes of states beyond these are stored as the largest, or as zero where a whole block is below the smallest.
constexpr float kCodeLargest = 0x1p100f, kCodeSmallest = 0x1p-100f;
constexpr int kCodeZero = 127;  // the byte of 0 in the signed dynamic code
constexpr int kCodeDecades = 7;

// What encoding and decoding look up. Decade c - 1 (c = 0: below the first one) holds evenly spaced magnitudes, so a
// line gives the index of x there: slope[c] * x + offset[c], lowered by a thousandth so that rounding errors cannot
// lift it above the true index, and at most last[c]. One comparison with the border above then corrects it.
struct DynamicCode {
  int32_t top = 0;         // index of magnitude 1: 128 signed, 255 unsigned
  float magnitude[256]{};  // in rising order, magnitude[0] = 0
  float border[256]{};     // between k and k + 1: the mean in fp32
  float decade[8]{};       // the borders below the decades
  float slope[8]{}, offset[8]{}, last[8]{};
};

constexpr DynamicCode make_dynamic_code(bool is_signed) {
  constexpr float kPowers[] = {1e-6f, 1e-5f, 1e-4f, 1e-3f, 1e-2f, 1e-1f, 1.0f};
  constexpr double kInverses[] = {1e6, 1e5, 1e4, 1e3, 1e2, 1e1, 1.0};
  DynamicCode t;
  int k = 1;
  for (int d = 0; d < kCodeDecades; ++d) {
    const int n = is_signed ? 1 << d : 2 << d, half = (n + 1) / 2;
    const float step = (1.0f - 0.1f) / static_cast<float>(n);
    float below = 0.1f;  // edges of n equal parts of [0.1, 1], counted from the nearer end
    t.slope[d + 1] = static_cast<float>(n / 0.9 * kInverses[d]);
    t.offset[d + 1] = static_cast<float>(k - n / 9.0 - 1e-3);
    t.last[d + 1] = static_cast<float>(k + n - 1);
    for (int i = 1; i <= n; ++i) {
      const float part = step * static_cast<float>(i < half ? i : n - i);
      const float above = i < half ? 0.1f + part : 1.0f - part;
      const float mean = (below + above) * 0.5f;
      t.magnitude[k++] = mean * kPowers[d];
      below = above;
    }
  }
  t.magnitude[k] = 1.0f;
  t.top = k;
  for (int i = 0; i < k; ++i) t.border[i] = (t.magnitude[i] + t.magnitude[i + 1]) * 0.5f;
  for (int d = 0; d < kCodeDecades; ++d) t.decade[d] = t.border[is_signed ? (1 << d) - 1 : (2 << d) - 2];
  return t;
}

// DynamicCode::magnitude[k], for device code, which has no such table: every operation rounded by itself.
SANA_EXT_HOST_DEVICE inline float dynamic_magnitude(int k, bool is_signed) {
  if (k == 0) return 0.0f;
  const int at = is_signed ? k : k + 1;  // in [n, 2 n)
  int n = is_signed ? 1 : 2, d = 0;
  while (2 * n <= at) n *= 2, ++d;
  if (d == kCodeDecades) return 1.0f;
  const float step = (1.0f - 0.1f) / static_cast<float>(n);
  float edges[2];
  for (int j = 0; j < 2; ++j) {
    const int i = at - n + j;
    const bool near_low = i < (n + 1) / 2;
    const float count = static_cast<float>(near_low ? i : n - i);
#ifdef __CUDA_ARCH__
    const float part = __fmul_rn(step, count);
#else
    const volatile float part = step * count;  // kept from being fused with the sum below
#endif
    edges[j] = near_low ? 0.1f + part : 1.0f - part;
  }
  const float mean = (edges[0] + edges[1]) * 0.5f;
  switch (d) {
    case 0:
      return mean * 1e-6f;
    case 1:
      return mean * 1e-5f;
    case 2:
      return mean * 1e-4f;
    case 3:
      return mean * 1e-3f;
    case 4:
      return mean * 1e-2f;
    case 5:
      return mean * 1e-1f;
    default:
      return mean;
  }
}

// Index of the magnitude nearest to x <= 1 + 2^-23, on a border the smaller one; 0 for x <= 0 and NaN. Code is a
// DynamicCode, or has its arrays elsewhere.
template <class Code>
SANA_EXT_HOST_DEVICE inline int encode_magnitude(const Code& t, float x) {
  if (!(x > t.decade[0])) return 0;
  int c = 1;
  for (int d = 1; d < kCodeDecades; ++d) c += x > t.decade[d];
  const float line = x * t.slope[c] + t.offset[c], last = t.last[c];
  const int k = static_cast<int>(line < last ? line : last);
  return k + (x > t.border[k]);
}

// x = value * (1 / scale), in [-1 - 2^-23, 1 + 2^-23] or NaN.
template <class Code>
SANA_EXT_HOST_DEVICE inline uint8_t encode_signed(const Code& t, float x) {
  const int k = encode_magnitude(t, x < 0 ? -x : x);
  return static_cast<uint8_t>(x < 0 ? kCodeZero - (k < kCodeZero ? k : kCodeZero) : kCodeZero + k);
}
// A positive value never takes the code of 0, even where value * inverse does or underflows.
template <class Code>
SANA_EXT_HOST_DEVICE inline uint8_t encode_unsigned(const Code& t, float value, float inverse) {
  const int k = encode_magnitude(t, value * inverse);
  return static_cast<uint8_t>(k == 0 && value > 0 ? 1 : k);
}
SANA_EXT_HOST_DEVICE inline float decode_signed(const DynamicCode& t, uint8_t code) {
  return code >= kCodeZero ? t.magnitude[code - kCodeZero] : -t.magnitude[kCodeZero - code];
}
SANA_EXT_HOST_DEVICE inline float decode_unsigned(const DynamicCode& t, uint8_t code) { return t.magnitude[code]; }

// A value as states keep it: finite.
SANA_EXT_HOST_DEVICE inline float saturated(float x) {
  if (!(x == x)) return 0.0f;
  return x > kCodeLargest ? kCodeLargest : x < -kCodeLargest ? -kCodeLargest : x;
}

// The scale of a block from its largest saturated magnitude (dynamic) or from its step (linear), and 1 / scale.
SANA_EXT_HOST_DEVICE inline float code_scale(float largest) { return largest < kCodeSmallest ? 0.0f : largest; }
SANA_EXT_HOST_DEVICE inline float code_inverse(float scale) { return scale > 0 ? 1.0f / scale : 0.0f; }
// The scale of a block of the unsigned code: 0 only where all values are.
SANA_EXT_HOST_DEVICE inline float unsigned_code_scale(float largest) {
  return largest > 0 && largest < kCodeSmallest ? kCodeSmallest : largest;
}

// Linear code: x saturated, step = linear_step(low, high), inverse = code_inverse(step), low = linear_low(low, high,
// step). No product here feeds an addition, so no compiler can fuse it and round otherwise. Where 0 lies between low
// and high it is one of the values.
SANA_EXT_HOST_DEVICE inline bool crosses_zero(float low, float high) { return low < 0 && high > 0; }
SANA_EXT_HOST_DEVICE inline float linear_step(float low, float high) {
  return code_scale((high - low) / (crosses_zero(low, high) ? 254.0f : 255.0f));
}
SANA_EXT_HOST_DEVICE inline float linear_low(float low, float high, float step) {
  if (!(low <= 0 && high >= 0)) return low;
  const float t = -low * code_inverse(step);
#ifdef __CUDA_ARCH__
  return -(rintf(t) * step);
#else
  return -(__builtin_rintf(t) * step);  // halves to even
#endif
}
SANA_EXT_HOST_DEVICE inline uint8_t encode_linear(float x, float low, float inverse) {
  const float t = (x - low) * inverse;
#ifdef __CUDA_ARCH__
  const int code = __float2int_rn(t);
#else
  const int code = static_cast<int>(__builtin_rintf(t));  // halves to even
#endif
  return static_cast<uint8_t>(code < 0 ? 0 : code > 255 ? 255 : code);
}
constexpr float kLinearRounding = 0x1p-10f;  // of a step: less than this is 0, whether the sum is fused or not
SANA_EXT_HOST_DEVICE inline float decode_linear(uint8_t code, float low, float step) {
  const float value = static_cast<float>(code) * step + low, least = step * kLinearRounding;
  return value < least && value > -least ? 0.0f : value;
}

}  // namespace sana_ext
