// Stochastic rounding to bf16 by counters; sana_ext/reference/rounding.py has the same.
#pragma once
#include "math.h"

namespace sana_ext {

// 32 random bits of element `index`: the finalizer of MurmurHash3.
SANA_EXT_HOST_DEVICE inline uint32_t random_bits(uint32_t index, uint32_t seed) {
  uint32_t h = index * 2654435769u + seed;
  h = (h ^ (h >> 16)) * 0x85ebca6bu;
  h = (h ^ (h >> 13)) * 0xc2b2ae35u;
  return h ^ (h >> 16);
}

// Away from zero with the probability of the fraction that is cut off; `random` is 32 random bits.
SANA_EXT_HOST_DEVICE inline uint16_t float_to_bfloat16_by_chance(float value, uint32_t random) {
  const uint32_t bits = float_bits(value);
  if ((bits & 0x7f800000u) == 0x7f800000u) return float_to_bfloat16(value);
  return static_cast<uint16_t>((bits + (random >> 16)) >> 16);
}

}  // namespace sana_ext
