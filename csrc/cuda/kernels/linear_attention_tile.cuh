// What the tuned kernels of linear_attention are made of. A warp works alone on one head of some tokens, 16 of them at
// a time, the depth of one mma: no barrier spans the block. Exact 16-bit operands go to the tensor cores as they are; a
// number that was computed goes as the sum of two bf16 (high and low, about 2^-17 in all), so nothing overflows either
// where a state of fp16 rows exceeds 65504.
#pragma once
#include "linear_attention.h"
#include "primitives.cuh"

namespace sana_ext::cuda {

constexpr int kHeadDim = kLinearAttentionTunedDim;
constexpr int kStateElements = (kHeadDim + 1) * kHeadDim;
constexpr int kTileTokens = 16, kTileElements = kTileTokens * kHeadDim;
constexpr int kRingStages = 4;
constexpr int kChunk = 8;  // 16-bit elements in 16 bytes
constexpr int kTileWarps = 4, kTileThreads = kTileWarps * kWarpSize;

// The warp's share: tokens [first, first + tokens) of image b, head h.
struct Unit {
  int64_t index, b, h, first;
  int tokens;
  __device__ Unit(const LinearAttentionSize& s)
      : index(static_cast<int64_t>(blockIdx.x) * kTileWarps + threadIdx.x / kWarpSize) {
    const int64_t rest = index / s.H, parts = s.parts();
    h = index % s.H, b = rest / parts, first = rest % parts * s.tokens;
    tokens = static_cast<int>(s.N - first < s.tokens ? s.N - first : s.tokens);
  }
  __device__ bool exists(const LinearAttentionSize& s) const { return b < s.B; }
};

inline int64_t tile_blocks(const LinearAttentionSize& s) {
  return (s.B * s.parts() * s.H + kTileWarps - 1) / kTileWarps;
}

// Where a chunk of a tile's row stands: two rows of four chunks fill the 32 banks, and rows 2i and 2i + 1 permute
// theirs by i, so that 8 rows of one chunk (an ldmatrix) and 8 whole rows (a copy) both touch every bank once.
__device__ inline int tile_at(int row, int chunk) { return row * kHeadDim + (chunk ^ (row / 2 % 4)) * kChunk; }

// A warp's own ring of tiles, kTensors in each stage, filled by asynchronous copies; rows past the end are zeros.
template <class T, int kTensors>
class Ring {
 public:
  static size_t bytes() { return shared_size<T>(kTileWarps * kRingStages * kTensors * kTileElements); }

  __device__ Ring(Shared<T> memory, int tokens)
      : memory_(memory + static_cast<int>(threadIdx.x / kWarpSize) * (kRingStages * kTensors * kTileElements)),
        tokens_(tokens) {}
  __device__ void source(int t, const LinearAttentionRows<ConstPtr>& x, const Unit& u) {
    const int lane = threadIdx.x % kWarpSize;
    from_[t] = static_cast<const T*>(x.p.data) + u.b * x.stride_b + u.first * x.stride_n + u.h * x.stride_h +
               lane % 4 * kChunk;
    stride_[t] = x.stride_n;
  }
  __device__ int tiles() const { return (tokens_ + kTileTokens - 1) / kTileTokens; }

  __device__ void start() {
#pragma unroll
    for (int i = 0; i < kRingStages - 1; ++i) fetch(i);
  }
  // Waits for tile i and starts to fetch the one that takes the place of tile i - 1, which all lanes have left.
  __device__ void advance(int i) {
    copy_async_wait<kRingStages - 2>();
    __syncwarp();
    fetch(i + kRingStages - 1);
  }
  __device__ Shared<T> tile(int i, int t) const { return memory_ + (i % kRingStages * kTensors + t) * kTileElements; }

 private:
  __device__ void fetch(int i) {
    if (i < tiles()) {
      const int lane = threadIdx.x % kWarpSize;
#pragma unroll
      for (int t = 0; t < kTensors; ++t) {
#pragma unroll
        for (int half = 0; half < 2; ++half) {
          const int row = half * 8 + lane / 4;
          const int token = i * kTileTokens + row;
          const bool valid = token < tokens_;
          copy_async16(tile(i, t) + tile_at(row, lane % 4), from_[t] + (valid ? token * stride_[t] : 0), valid);
        }
      }
    }
    copy_async_commit();  // also where there is nothing to fetch: waits count groups
  }

  Shared<T> memory_;
  int tokens_;
  const T* from_[kTensors];
  int64_t stride_[kTensors];
};

// A number of each of 16 tokens, fetched one tile ahead; lane i holds that of token i % 16, 0 past the end.
class TokenValues {
 public:
  __device__ TokenValues(const float* values, const LinearAttentionSize& s, const Unit& u)
      : values_(values == nullptr ? nullptr : values + u.b * s.N + u.first), tokens_(u.tokens), next_(fetch(0)) {}
  __device__ float take(int i) {  // of tile i, and goes on to the next
    const float value = next_;
    next_ = fetch(i + 1);
    return value;
  }

 private:
  __device__ float fetch(int i) const {
    const int token = i * kTileTokens + static_cast<int>(threadIdx.x % kTileTokens);
    return values_ != nullptr && token < tokens_ ? load_global(values_ + token) : 0.0f;
  }
  const float* values_;
  int tokens_;
  float next_;
};

// Fragments of a tile. With g = lane / 4 and t = 2 (lane % 4), pairs: along the channels, tokens as rows of A:
// (token g, channel t), (g + 8, t), (g, t + 8), (g + 8, t + 8) of the 16 channels of `step`;
template <class T>
__device__ inline void load_rows(uint32_t (&a)[4], Shared<T> tile, int step) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrix(a, tile + tile_at(lane % 16, 2 * step + lane / 16));
}
// along the tokens, channels as rows of A: (channel g, token t), (g + 8, t), (g, t + 8), (g + 8, t + 8);
template <class T>
__device__ inline void load_columns(uint32_t (&a)[4], Shared<T> tile, int step) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrix_transposed(a, tile + tile_at(lane / 16 * 8 + lane % 8, 2 * step + lane / 8 % 2));
}
// along the tokens, channels as columns of B: (token t, channel g), (t + 8, g), (t, g + 8), (t + 8, g + 8).
template <class T>
__device__ inline void load_right(uint32_t (&b)[4], Shared<T> tile, int step) {
  const int lane = threadIdx.x % kWarpSize;
  load_matrix_transposed(b, tile + tile_at(lane % 16, 2 * step + lane / 16));
}

// Bit 31 of the sign of channel i's weight.
__device__ inline uint32_t sign_bit(ConstPtr weight, int64_t i) {
  return weight ? float_bits(load_element(weight, i)) & 0x80000000u : 0u;
}
__device__ inline float magnitude(ConstPtr weight, int64_t i) {
  return weight ? bits_float(float_bits(load_element(weight, i)) & 0x7fffffffu) : 1.0f;
}
// The sign bits of load_rows' words: sign[step][0] of channels t and t + 1, [1] of those 8 further.
__device__ inline void load_row_signs(uint32_t (&sign)[2][2], ConstPtr weight, int64_t channel) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const int64_t c = channel + i * 8 + threadIdx.x % 4 * 2;
    sign[i / 2][i % 2] = sign_bit(weight, c) >> 16 | sign_bit(weight, c + 1);
  }
}
// Those of load_columns' words: sign[step][0] of channel g, [1] of that 8 further.
__device__ inline void load_column_signs(uint32_t (&sign)[2][2], ConstPtr weight, int64_t channel) {
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t bit = sign_bit(weight, channel + i * 8 + threadIdx.x % kWarpSize / 4);
    sign[i / 2][i % 2] = bit >> 16 | bit;
  }
}

// x and y, each as high + low.
template <class T>
__device__ inline void split(float x, float y, uint32_t& high, uint32_t& low) {
  float high_x, high_y;
  high = pack<T>(x, y);
  unpack<T>(high, high_x, high_y);
  low = pack<T>(x - high_x, y - high_y);
}

// An exact operand as bf16 terms: itself, or the two that an fp16 number is the sum of.
template <class T>
inline constexpr int kTerms = 1;
template <>
inline constexpr int kTerms<Half> = 2;

template <class T>
__device__ inline void to_terms(const uint32_t (&a)[4], uint32_t (&term)[kTerms<T>][4]) {
#pragma unroll
  for (int r = 0; r < 4; ++r) {
    if constexpr (kTerms<T> == 1) {
      term[0][r] = a[r];
    } else {
      float x, y;
      unpack<T>(a[r], x, y);
      split<BFloat16>(x, y, term[0][r], term[1][r]);
    }
  }
}

// d += a b of an exact a and b = high + low; the product of two low terms is beyond what is kept.
template <int kCount>
__device__ inline void multiply(float (&d)[4], const uint32_t (&a)[kCount][4], const uint32_t (&b)[2][2]) {
  mma_16x8x16<BFloat16>(d, a[0], b[1]);
  if constexpr (kCount == 2) mma_16x8x16<BFloat16>(d, a[1], b[0]);
  mma_16x8x16<BFloat16>(d, a[0], b[0]);
}

// A 32x32 matrix as B, [step of 16 rows][8 columns][high, low][word]: of m[i][j] = |weight_i| state[i][j], rows i, or,
// transposed, rows j.
using StateFragments = uint32_t[2][4][2][2];
template <bool kTransposed>
__device__ inline void load_state(StateFragments& b, const float* state, ConstPtr weight, int64_t channel) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4 * 2;
#pragma unroll
  for (int step = 0; step < 2; ++step) {
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int word = 0; word < 2; ++word) {
        const int row = step * 16 + word * 8 + t, column = n * 8 + g;
        float m[2];
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int i = kTransposed ? column : row + e, j = kTransposed ? row + e : column;
          m[e] = load_global(state + i * kHeadDim + j) * magnitude(weight, channel + i);
        }
        split<BFloat16>(m[0], m[1], b[step][n][0][word], b[step][n][1][word]);
      }
    }
  }
}

// Sums over the four lanes that share a row of d, and over the eight that share a column.
__device__ inline float row_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 1);
  return v + __shfl_xor_sync(kAllLanes, v, 2);
}
__device__ inline float column_sum(float v) {
  v += __shfl_xor_sync(kAllLanes, v, 4);
  v += __shfl_xor_sync(kAllLanes, v, 8);
  return v + __shfl_xor_sync(kAllLanes, v, 16);
}

// Lane q of a group of four gives word[i] to lane i and gets word[i] from lane i: a transpose.
__device__ inline void exchange(uint32_t (&word)[4]) {
  const bool odd = threadIdx.x % 2 != 0, upper = threadIdx.x / 2 % 2 != 0;
  uint32_t pair[2][2];  // [word / 2][lane % 2]
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, odd ? word[2 * i] : word[2 * i + 1], 1);
    pair[i][0] = odd ? got : word[2 * i], pair[i][1] = odd ? word[2 * i + 1] : got;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const uint32_t got = __shfl_xor_sync(kAllLanes, upper ? pair[0][i] : pair[1][i], 2);
    word[i] = upper ? got : pair[0][i], word[2 + i] = upper ? pair[1][i] : got;
  }
}

// Writes rows of 8 tokens, word[n] holding channels 8 n + t and 8 n + t + 1 of token 8 half + g of tile i.
template <class T>
class RowWriter {
 public:
  __device__ RowWriter(const LinearAttentionRows<Ptr>& x, const Unit& u)
      : to_(static_cast<T*>(x.p.data) + u.b * x.stride_b + u.first * x.stride_n + u.h * x.stride_h +
            threadIdx.x % 4 * kChunk),
        stride_(x.stride_n),
        tokens_(u.tokens) {}
  __device__ void write(int i, int half, uint32_t (&word)[4]) const {
    exchange(word);
    const int token = i * kTileTokens + half * 8 + static_cast<int>(threadIdx.x % kWarpSize / 4);
    if (token < tokens_)
      store_global(reinterpret_cast<Bytes16*>(to_ + token * stride_), Bytes16{{word[0], word[1], word[2], word[3]}});
  }

 private:
  T* to_;
  int64_t stride_;
  int tokens_;
};

// Writes a part of the state, d[m][n] holding rows 16 m + g (+ 8), columns 8 n + t (+ 1), times |weight_i| factor.
__device__ inline void store_state(float* to, const float (&d)[2][4][4], ConstPtr weight, int64_t channel,
                                   float factor = 1.0f) {
  const int lane = threadIdx.x % kWarpSize, g = lane / 4, t = lane % 4 * 2;
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = m * 16 + half * 8 + g;
      const float scale = magnitude(weight, channel + i) * factor;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) store_global(to + i * kHeadDim + n * 8 + t + e, d[m][n][2 * half + e] * scale);
      }
    }
  }
}

// Whether the tuned kernels reach these rows, and their common dtype.
inline bool takes_tiles(ConstPtr p, int64_t stride_b, int64_t stride_n, int64_t stride_h) {
  return p.dtype != Dtype::kFloat32 && reinterpret_cast<uintptr_t>(p.data) % 16 == 0 && stride_b % kChunk == 0 &&
         stride_n % kChunk == 0 && stride_h % kChunk == 0;
}
template <class Pointer, class... Others>
bool takes_tiles(const LinearAttentionSize& s, const LinearAttentionRows<Pointer>& first, const Others&... others) {
  const auto fits = [&](const auto& x) {
    return x.p.dtype == first.p.dtype && takes_tiles(x.p, x.stride_b, x.stride_n, x.stride_h);
  };
  return s.D == kHeadDim && fits(first) && (fits(others) && ...) && s.N < int64_t{1} << 31 &&
         tile_blocks(s) < int64_t{1} << 31;
}

}  // namespace sana_ext::cuda
