// B batch, N tokens, H heads, D = 32 channels of a head. One warp per head and part of the tokens; 16 tokens at a time
// arrive by asynchronous copies, four tiles deep.
// State:  1. khat^T as A, channels as rows; v as B: both straight from the tile by ldmatrix.trans,
//         2. S += khat^T v and z += khat^T 1 on tensor cores: products of 16-bit numbers are exact, sums fp32,
//         3. with a norm khat = rstd_k relu(+-k) is split into two 16-bit terms, and |weight_k| scales the rows of S.
// Output: 1. |weight_q| S and |weight_q| z once into registers, as B, each number two bf16,
//         2. relu(+-q) as A; five products per 16 tokens, the fifth with z in all columns: every lane has its
//            denominators,
//         3. divide, round once, trade words among four lanes and store 16 bytes each.
#include "linear_attention_generic.h"
#include "linear_attention_tile.cuh"

namespace sana_ext::cuda {
namespace {

// fp16 terms of normalised keys, at most sqrt(C), are raised by this power of two, far from the subnormals.
template <class T>
__device__ inline float key_scale(int64_t C) {
  float scale = 1.0f;
  if (kTerms<T> == 2)
    while (4.0f * scale * scale * static_cast<float>(C) <= 0x1p30f) scale *= 2.0f;
  return scale;
}

template <class T, bool kNorm>
__global__ void __launch_bounds__(kTileThreads, 5) linear_attention_state_kernel(LinearAttentionState a) {
  SharedMemory memory;
  const Shared<T> tiles = memory.take<T>(kTileWarps * kRingStages * 2 * kTileElements);
  const Unit unit(a.size);
  if (!unit.exists(a.size)) return;  // the whole warp
  const int t = threadIdx.x % 4 * 2;
  Ring<T, 2> ring(tiles, unit.tokens);
  ring.source(0, a.k, unit), ring.source(1, a.v, unit);
  ring.start();
  const int64_t channel = unit.h * kHeadDim;
  uint32_t sign[2][2];
  load_column_signs(sign, a.weight_k, channel);
  const float raise = kNorm ? key_scale<T>(a.size.H * kHeadDim) : 1.0f;
  TokenValues rstd(kNorm ? a.rstd_k : nullptr, a.size, unit);
  const uint32_t one = pack<T>(1.0f, 1.0f), ones[2] = {one, one}, zeros[2] = {};
  float S[2][4][4] = {}, z[2][4] = {};
  for (int i = 0; i < ring.tiles(); ++i) {
    ring.advance(i);
    uint32_t v[2][4];
#pragma unroll
    for (int n = 0; n < 2; ++n) load_right(v[n], ring.tile(i, 1), n);
    float scale[4];
    if (kNorm) {
      const float own = rstd.take(i) * raise;
#pragma unroll
      for (int e = 0; e < 4; ++e) scale[e] = __shfl_sync(kAllLanes, own, t + e % 2 + e / 2 * 8);
    }
#pragma unroll
    for (int m = 0; m < 2; ++m) {
      uint32_t k[4], low[4];
      load_columns(k, ring.tile(i, 0), m);
      if (kNorm) mma_16x8x16<T>(z[m], k, zeros);  // as in the output: NaN of an infinite k, on either side of the ReLU
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        k[r] = relu2<T>(k[r] ^ sign[m][r % 2]);
        if (kNorm) {
          float x, y;
          unpack<T>(k[r], x, y);
          split<T>(x * scale[r / 2 * 2], y * scale[r / 2 * 2 + 1], k[r], low[r]);
        }
      }
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        const uint32_t right[2] = {v[n / 2][n % 2 * 2], v[n / 2][n % 2 * 2 + 1]};
        if (kNorm) mma_16x8x16<T>(S[m][n], low, right);
        mma_16x8x16<T>(S[m][n], k, right);
      }
      if (kNorm) mma_16x8x16<T>(z[m], low, ones);
      mma_16x8x16<T>(z[m], k, ones);
    }
  }
  float* const to = a.partial + unit.index * kStateElements;
  store_state(to, S, a.weight_k, channel, 1.0f / raise);
  if (t != 0) return;  // all columns of z are the same
#pragma unroll
  for (int m = 0; m < 2; ++m) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const int i = m * 16 + half * 8 + threadIdx.x % kWarpSize / 4;
      store_global(to + kHeadDim * kHeadDim + i, z[m][2 * half] * (magnitude(a.weight_k, channel + i) / raise));
    }
  }
}

template <class T>
__global__ void __launch_bounds__(kTileThreads, 5) linear_attention_output_kernel(LinearAttentionOutput a) {
  SharedMemory memory;
  const Shared<T> tiles = memory.take<T>(kTileWarps * kRingStages * kTileElements);
  const Unit unit(a.size);
  if (!unit.exists(a.size)) return;  // the whole warp
  const int g = threadIdx.x % kWarpSize / 4, t = threadIdx.x % 4 * 2;
  Ring<T, 1> ring(tiles, unit.tokens);
  ring.source(0, a.q, unit);
  ring.start();
  const int64_t channel = unit.h * kHeadDim;
  const float* const state = a.state + (unit.b * a.size.H + unit.h) * kStateElements;
  uint32_t sign[2][2], z[2][2][2];
  StateFragments S;
  load_row_signs(sign, a.weight_q, channel);
  load_state<false>(S, state, a.weight_q, channel);
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    float m[2];
#pragma unroll
    for (int e = 0; e < 2; ++e)
      m[e] = load_global(state + kHeadDim * kHeadDim + i * 8 + t + e) * magnitude(a.weight_q, channel + i * 8 + t + e);
    split<BFloat16>(m[0], m[1], z[i / 2][0][i % 2], z[i / 2][1][i % 2]);
  }
  TokenValues rstd(a.rstd_q, a.size, unit);
  const RowWriter<T> writer(a.out, unit);
  for (int i = 0; i < ring.tiles(); ++i) {
    ring.advance(i);
    float out[4][4] = {}, denominator[4] = {};
    const uint32_t zeros[2] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t q[4], u[kTerms<T>][4];
      load_rows(q, ring.tile(i, 0), step);
      // With a norm an infinite q is NaN, even where the ReLU would hide it: 0 * q.
      if (a.weight_q) mma_16x8x16<T>(denominator, q, zeros);
#pragma unroll
      for (int r = 0; r < 4; ++r) q[r] = relu2<T>(q[r] ^ sign[step][r / 2]);
      to_terms<T>(q, u);
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply(out[n], u, S[step][n]);
      multiply(denominator, u, z[step]);
    }
    const float own = rstd.take(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const float scale = __shfl_sync(kAllLanes, own, half * 8 + g);
      const float d = denominator[2 * half] + (a.rstd_q == nullptr ? a.eps : scale == 0.0f ? 0.0f : a.eps / scale);
      const float inverse = d == 0.0f ? 0.0f : 1.0f / d;
      uint32_t word[4];
#pragma unroll
      for (int n = 0; n < 4; ++n) word[n] = pack<T>(out[n][2 * half] * inverse, out[n][2 * half + 1] * inverse);
      writer.write(i, half, word);
    }
  }
}

template <class T>
cudaError_t launch_state(const LinearAttentionState& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tile_blocks(a.size));
  const size_t shared = Ring<T, 2>::bytes();
  if (a.rstd_k != nullptr)
    return SANA_EXT_LAUNCH((linear_attention_state_kernel<T, true>), blocks, kTileThreads, shared, stream, a);
  return SANA_EXT_LAUNCH((linear_attention_state_kernel<T, false>), blocks, kTileThreads, shared, stream, a);
}

template <class T>
cudaError_t launch_output(const LinearAttentionOutput& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tile_blocks(a.size));
  return SANA_EXT_LAUNCH(linear_attention_output_kernel<T>, blocks, kTileThreads, (Ring<T, 1>::bytes()), stream, a);
}

}  // namespace

cudaError_t linear_attention_state(const LinearAttentionState& a, cudaStream_t stream) {
  if (a.size.B == 0) return cudaSuccess;
  if (!takes_tiles(a.size, a.k, a.v)) return linear_attention_state_generic(a, stream);
  return a.k.p.dtype == Dtype::kBFloat16 ? launch_state<BFloat16>(a, stream) : launch_state<Half>(a, stream);
}

cudaError_t linear_attention_output(const LinearAttentionOutput& a, cudaStream_t stream) {
  if (a.size.B == 0) return cudaSuccess;
  if (!takes_tiles(a.size, a.q, a.out)) return linear_attention_output_generic(a, stream);
  return a.q.p.dtype == Dtype::kBFloat16 ? launch_output<BFloat16>(a, stream) : launch_output<Half>(a, stream);
}

}  // namespace sana_ext::cuda
