// Host twins of the warp-wide operations: shuffles, votes, reductions, ldmatrix, mma. Fragment layouts: PTX ISA,
// "Matrix fragments for mma.m16n8k16" and "ldmatrix". Included by primitives.h.
#pragma once
#include "primitives.h"

namespace sana_ext::cuda {

using emulator::kWarpSize;
using emulator::Lanes;

constexpr unsigned kAllLanes = 0xffffffffu;

// Shuffles: lane i gets the value of lane source(i), or keeps its own where there is no such lane in its segment.

template <class T>
struct ShuffleOperand {
  T value;
  int argument, width;
};

template <class T, class Source>
void shuffle_lanes(const Lanes& lanes, Source source) {
  T results[kWarpSize];
  for (int i = 0; i < kWarpSize; ++i) {
    if ((lanes.mask >> i & 1) == 0) continue;
    const auto& own = *static_cast<const ShuffleOperand<T>*>(lanes.in[i]);
    const int from = source(i, own.argument, own.width);
    if ((lanes.mask >> from & 1) == 0)
      this_block().fault("shuffle: lane " + std::to_string(i) + " reads lane " + std::to_string(from) +
                         ", which is not in the mask");
    results[i] = static_cast<const ShuffleOperand<T>*>(lanes.in[from])->value;
  }
  for (int i = 0; i < kWarpSize; ++i)
    if (lanes.mask >> i & 1) *static_cast<T*>(lanes.out[i]) = results[i];
}

template <class T>
T shuffle(const char* name, unsigned mask, T value, int argument, int width, void (*operation)(const Lanes&),
          emulator::Site site) {
  if (width < 1 || width > kWarpSize || (width & (width - 1)) != 0)
    this_block().fault(std::string(name) + ": width " + std::to_string(width) + " is no power of two up to 32");
  const ShuffleOperand<T> operand{value, argument, width};
  T result;
  this_block().collective(name, mask, &operand, &result, operation, site);
  return result;
}

template <class T>
T __shfl_xor_sync(unsigned mask, T value, int lanes_apart, int width = kWarpSize, SANA_EXT_SITE) {
  return shuffle<T>(
      "__shfl_xor_sync", mask, value, lanes_apart, width,
      [](const Lanes& lanes) {
        shuffle_lanes<T>(lanes, [](int i, int apart, int w) {
          const int from = i ^ apart;  // may reach an earlier segment, but no later one
          return from >= (i / w + 1) * w ? i : from;
        });
      },
      site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned lanes_apart, int width = kWarpSize, SANA_EXT_SITE) {
  return shuffle<T>(
      "__shfl_down_sync", mask, value, static_cast<int>(lanes_apart), width,
      [](const Lanes& lanes) {
        shuffle_lanes<T>(lanes, [](int i, int apart, int w) { return i % w + apart < w ? i + apart : i; });
      },
      site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned lanes_apart, int width = kWarpSize, SANA_EXT_SITE) {
  return shuffle<T>(
      "__shfl_up_sync", mask, value, static_cast<int>(lanes_apart), width,
      [](const Lanes& lanes) {
        shuffle_lanes<T>(lanes, [](int i, int apart, int w) { return i % w >= apart ? i - apart : i; });
      },
      site);
}
template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = kWarpSize, SANA_EXT_SITE) {
  return shuffle<T>(
      "__shfl_sync", mask, value, lane, width,
      [](const Lanes& lanes) {
        shuffle_lanes<T>(lanes, [](int i, int from, int w) { return i / w * w + (from & (w - 1)); });
      },
      site);
}

// Votes and reductions: every lane gets the same value.

inline unsigned __ballot_sync(unsigned mask, bool predicate, SANA_EXT_SITE) {
  unsigned result = 0;
  this_block().collective(
      "__ballot_sync", mask, &predicate, &result,
      [](const Lanes& lanes) {
        unsigned votes = 0;
        for (int i = 0; i < kWarpSize; ++i)
          if (lanes.mask >> i & 1 && *static_cast<const bool*>(lanes.in[i])) votes |= 1u << i;
        for (int i = 0; i < kWarpSize; ++i)
          if (lanes.mask >> i & 1) *static_cast<unsigned*>(lanes.out[i]) = votes;
      },
      site);
  return result;
}
inline bool __any_sync(unsigned mask, bool predicate, SANA_EXT_SITE) {
  return __ballot_sync(mask, predicate, site) != 0;
}
inline bool __all_sync(unsigned mask, bool predicate, SANA_EXT_SITE) {
  return __ballot_sync(mask, predicate, site) == mask;
}
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SANA_EXT_SITE) {
  unsigned result = 0;
  this_block().collective(
      "__reduce_add_sync", mask, &value, &result,
      [](const Lanes& lanes) {
        unsigned sum = 0;
        for (int i = 0; i < kWarpSize; ++i)
          if (lanes.mask >> i & 1) sum += *static_cast<const unsigned*>(lanes.in[i]);
        for (int i = 0; i < kWarpSize; ++i)
          if (lanes.mask >> i & 1) *static_cast<unsigned*>(lanes.out[i]) = sum;
      },
      site);
  return result;
}

// kMatrices 8x8 matrices of 16-bit elements. Lane 8m + r names row r of matrix m (16 aligned bytes). Lane i gets
// elements (i / 4, 2 (i % 4)) and the next of each row, or, transposed, (2 (i % 4), i / 4) and the one below.
template <bool kTransposed, int kMatrices, class T>
void load_matrices(uint32_t (&fragment)[kMatrices], Shared<T> row, emulator::Site site) {
  static_assert(kMatrices == 1 || kMatrices == 2 || kMatrices == 4, "ldmatrix loads 1, 2 or 4 matrices");
  static_assert(sizeof(T) == 2, "ldmatrix is for 16-bit elements");
  const bool names_row = static_cast<int>(this_block().thread().lane()) < 8 * kMatrices;
  const size_t own = names_row ? row.checked16() : 0;
  this_block().collective(
      kTransposed ? "ldmatrix.trans" : "ldmatrix", kAllLanes, &own, fragment,
      [](const Lanes& lanes) {
        for (int i = 0; i < kWarpSize; ++i) {
          for (int m = 0; m < kMatrices; ++m) {
            uint16_t pair[2];
            for (int e = 0; e < 2; ++e) {
              const int r = kTransposed ? i % 4 * 2 + e : i / 4, c = kTransposed ? i / 4 : i % 4 * 2 + e;
              const size_t start = *static_cast<const size_t*>(lanes.in[8 * m + r]);
              this_block().read_shared_by_lane(i, start + 2 * static_cast<size_t>(c), &pair[e], 2);
            }
            static_cast<uint32_t*>(lanes.out[i])[m] = pair[0] | static_cast<uint32_t>(pair[1]) << 16;
          }
        }
      },
      site);
}
template <int kMatrices, class T>
void load_matrix(uint32_t (&fragment)[kMatrices], Shared<T> row, SANA_EXT_SITE) {
  load_matrices<false>(fragment, row, site);
}
template <int kMatrices, class T>
void load_matrix_transposed(uint32_t (&fragment)[kMatrices], Shared<T> row, SANA_EXT_SITE) {
  load_matrices<true>(fragment, row, site);
}

// d[16, 8] += a[16, 16] b[16, 8] in fp32. With g = lane / 4 and t = 2 (lane % 4), pairs along the row of a, down the
// column of b and along the row of d: a = (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8); b = (t, g), (t + 8, g);
// d = (g, t), (g + 8, t).
template <class T>
void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2], SANA_EXT_SITE) {
  struct Operands {
    uint32_t a[4], b[2];
    float* d;
  } own;
  std::memcpy(own.a, a, sizeof a);
  std::memcpy(own.b, b, sizeof b);
  own.d = d;
  this_block().collective(
      "mma.sync", kAllLanes, &own, nullptr,
      [](const Lanes& lanes) {
        float A[16][16], B[16][8];
        for (int i = 0; i < kWarpSize; ++i) {
          const auto& o = *static_cast<const Operands*>(lanes.in[i]);
          const int g = i / 4, t = i % 4 * 2;
          for (int r = 0; r < 4; ++r) {
            float* pair = &A[g + r % 2 * 8][t + r / 2 * 8];
            unpack<T>(o.a[r], pair[0], pair[1]);
          }
          for (int r = 0; r < 2; ++r) unpack<T>(o.b[r], B[t + r * 8][g], B[t + r * 8 + 1][g]);
        }
        for (int i = 0; i < kWarpSize; ++i) {
          const auto& o = *static_cast<const Operands*>(lanes.in[i]);
          for (int r = 0; r < 4; ++r) {
            float sum = o.d[r];
            for (int k = 0; k < 16; ++k) sum += A[i / 4 + r / 2 * 8][k] * B[k][i % 4 * 2 + r % 2];
            o.d[r] = sum;
          }
        }
      },
      site);
}

}  // namespace sana_ext::cuda
