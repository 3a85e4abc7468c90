// Eight consecutive values of a lane, from element i on: `whole` ones, aligned, in 16-byte accesses, else the first
// `count`.
#pragma once
#include "../../common/rounding.h"
#include "primitives.cuh"

namespace sana_ext::cuda {

constexpr int kLaneValues = 8;

// Eight values as they lie in memory: bf16 in low, fp32 in both. All loads of some rows are under way before the first
// is unpacked.
struct Raw {
  Bytes16 low, high;
};

__device__ inline Raw load_values(const void* data, bool bf16, int64_t i, int count, bool whole) {
  Raw raw{};
  if (whole && bf16) {
    raw.low = load_global(reinterpret_cast<const Bytes16*>(static_cast<const BFloat16*>(data) + i));
  } else if (whole) {
    const auto* from = reinterpret_cast<const Bytes16*>(static_cast<const float*>(data) + i);
    raw.low = load_global(from), raw.high = load_global(from + 1);
  } else {
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j) {
      if (j >= count) continue;
      if (bf16)
        raw.low.word[j / 2] |= static_cast<uint32_t>(load_global(static_cast<const uint16_t*>(data) + i + j))
                               << 16 * (j % 2);
      else
        (j < 4 ? raw.low : raw.high).word[j % 4] = float_bits(load_global(static_cast<const float*>(data) + i + j));
    }
  }
  return raw;
}

__device__ inline uint64_t load_codes(const uint8_t* data, int64_t i, int count, bool whole, uint8_t beyond = 0) {
  if (whole) return load_global(reinterpret_cast<const uint64_t*>(data + i));
  uint64_t codes = 0;
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j)
    codes |= static_cast<uint64_t>(j < count ? load_global(data + i + j) : beyond) << 8 * j;
  return codes;
}

__device__ inline void unpack_values(const Raw& raw, bool bf16, float (&v)[kLaneValues]) {
  if (bf16) {
#pragma unroll
    for (int j = 0; j < 4; ++j) unpack<BFloat16>(raw.low.word[j], v[2 * j], v[2 * j + 1]);
  } else {
#pragma unroll
    for (int j = 0; j < 4; ++j) v[j] = bits_float(raw.low.word[j]), v[4 + j] = bits_float(raw.high.word[j]);
  }
}

__device__ inline void store_floats(float* data, int64_t i, int count, bool whole, const float (&v)[kLaneValues]) {
  if (whole) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Bytes16 bytes;
#pragma unroll
      for (int j = 0; j < 4; ++j) bytes.word[j] = float_bits(v[4 * half + j]);
      store_global(reinterpret_cast<Bytes16*>(data + i) + half, bytes);
    }
  } else {
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j)
      if (j < count) store_global(data + i + j, v[j]);
  }
}

// Rounded to nearest, or by chance where seed is not negative.
__device__ inline void store_bf16(uint16_t* data, int64_t i, int count, bool whole, int64_t seed,
                                  const float (&v)[kLaneValues]) {
  uint16_t bits[kLaneValues];
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j)
    bits[j] = seed < 0 ? float_to_bfloat16(v[j])
                       : float_to_bfloat16_by_chance(
                             v[j], random_bits(static_cast<uint32_t>(i + j), static_cast<uint32_t>(seed)));
  if (whole) {
    Bytes16 bytes;
#pragma unroll
    for (int j = 0; j < 4; ++j) bytes.word[j] = bits[2 * j] | static_cast<uint32_t>(bits[2 * j + 1]) << 16;
    store_global(reinterpret_cast<Bytes16*>(data + i), bytes);
  } else {
#pragma unroll
    for (int j = 0; j < kLaneValues; ++j)
      if (j < count) store_global(data + i + j, bits[j]);
  }
}

__device__ inline void store_codes(uint8_t* data, int64_t i, int count, bool whole, uint64_t codes) {
  if (whole) return store_global(reinterpret_cast<uint64_t*>(data + i), codes);
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j)
    if (j < count) store_global(data + i + j, static_cast<uint8_t>(codes >> 8 * j));
}

}  // namespace sana_ext::cuda
