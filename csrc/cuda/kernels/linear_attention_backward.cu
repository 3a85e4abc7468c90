// B batch, N tokens, H heads, D = 32 channels of a head. As in the forward: a warp per head and part, 16 tokens at a
// time. q:  1. t = S g: dout as A, |weight_q| S transposed as B; u = relu(+-q) lies in registers where t does,
//     2. per token 1 / d, s = u . t / d and b = -s / d, by shuffles among the four lanes of a row,
//     3. dq = +-(t / d + b z) where u > 0; dz += b u,
//     4. dS += u^T (g / d): u with channels as rows and g again, transposed, from the tile; g / d as two bf16.
// k:  dkhat = dS v + dz from v as A, dv = dS^T khat from relu(+-k) as A; the row scale rstd_k comes after the product.
// The gradient through the norm of k needs one sum over all heads of a token first: kRowsOnly makes the heads' shares,
// sum_parts adds them up; the same for q where its row scale counts. The weights' gradients need the states alone.
#include "linear_attention_generic.h"
#include "linear_attention_tile.cuh"

namespace sana_ext::cuda {
namespace {

// Blocks per multiprocessor: as many as the registers of a row of bf16, or of its two terms if fp16, allow.
template <class T>
[[maybe_unused]] constexpr int kBlocks = kTerms<T> == 1 ? 3 : 2;

template <class T, bool kRowsOnly>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>)
    linear_attention_backward_q_kernel(LinearAttentionBackwardQ a) {
  SharedMemory memory;
  const Shared<T> tiles = memory.take<T>(kTileWarps * kRingStages * 2 * kTileElements);
  const Unit unit(a.size);
  if (!unit.exists(a.size)) return;  // the whole warp
  const int g = threadIdx.x % kWarpSize / 4, t_column = threadIdx.x % 4 * 2;
  Ring<T, 2> ring(tiles, unit.tokens);
  ring.source(0, a.q, unit), ring.source(1, a.dout, unit);
  ring.start();
  const int64_t channel = unit.h * kHeadDim, head = unit.b * a.size.H + unit.h;
  const float* const state = a.state + head * kStateElements;
  StateFragments S;
  load_state<true>(S, state, a.weight_q, channel);
  uint32_t row_sign[2][2], column_sign[2][2];
  load_row_signs(row_sign, a.weight_q, channel);
  if (!kRowsOnly) load_column_signs(column_sign, a.weight_q, channel);
  float z[4][2], dz[4][2] = {}, dS[2][4][4] = {};
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = n * 8 + t_column + e;
      z[n][e] = load_global(state + kHeadDim * kHeadDim + i) * magnitude(a.weight_q, channel + i);
    }
  }
  TokenValues rstd(a.rstd_q, a.size, unit), row_sums(a.rstd_q == nullptr ? nullptr : a.row_sums, a.size, unit);
  const RowWriter<T> writer(a.dq, unit);
  for (int i = 0; i < ring.tiles(); ++i) {
    ring.advance(i);
    uint32_t q[2][4];
    float t[4][4] = {}, u[4][4];
    const uint32_t zeros[2] = {};
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t dout[4], terms[kTerms<T>][4];
      load_rows(dout, ring.tile(i, 1), step);
      to_terms<T>(dout, terms);
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply(t[n], terms, S[step][n]);
      load_rows(q[step], ring.tile(i, 0), step);
      // With a norm an infinite q is NaN, even where the ReLU would hide it: 0 * q into t, and from there into d.
      if (a.weight_q) mma_16x8x16<T>(t[0], q[step], zeros);
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        q[step][r] ^= row_sign[step][r / 2];
        float* const pair = &u[2 * step + r / 2][r % 2 * 2];
        unpack<T>(relu2<T>(q[step][r]), pair[0], pair[1]);
      }
    }
    const float own_rstd = rstd.take(i), own_row_sum = row_sums.take(i);
    float inverse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // token g, token g + 8
      float d = a.weight_q ? 0.0f * t[0][2 * half] : 0.0f, s = 0.0f;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          d += u[n][2 * half + e] * z[n][e];
          s += u[n][2 * half + e] * t[n][2 * half + e];
        }
      }
      const float row_rstd = __shfl_sync(kAllLanes, own_rstd, half * 8 + g);
      d = row_sum(d) + (a.rstd_q == nullptr ? a.eps : row_rstd == 0.0f ? 0.0f : a.eps / row_rstd);
      inverse[half] = d == 0.0f ? 0.0f : 1.0f / d;
      const float b = -row_sum(s) * inverse[half] * inverse[half];
      if constexpr (kRowsOnly) {
        const int64_t token = unit.first + i * kTileTokens + half * 8 + g;
        if (t_column == 0 && token < unit.first + unit.tokens) store_global(a.work + head * a.size.N + token, b);
      } else {
        const float through_norm = a.eps * row_rstd / static_cast<float>(a.size.H * kHeadDim) *
                                   __shfl_sync(kAllLanes, own_row_sum, half * 8 + g);
        uint32_t word[4];
#pragma unroll
        for (int n = 0; n < 4; ++n) {
          float dq[2];
#pragma unroll
          for (int e = 0; e < 2; ++e) {
            const float value = u[n][2 * half + e];
            dz[n][e] += b * value;
            dq[e] = value <= 0.0f ? 0.0f * b : t[n][2 * half + e] * inverse[half] + b * z[n][e];
          }
          const uint32_t signed_q = q[n / 2][n % 2 * 2 + half];
          if (a.rstd_q != nullptr) {
            float x, y;
            unpack<T>(signed_q, x, y);
            dq[0] += x * through_norm, dq[1] += y * through_norm;
          }
          word[n] = pack<T>(dq[0], dq[1]) ^ row_sign[n / 2][n % 2];
        }
        writer.write(i, half, word);
      }
    }
    if constexpr (!kRowsOnly) {
      float scale[4];
#pragma unroll
      for (int e = 0; e < 4; ++e)
        scale[e] =
            __shfl_sync(kAllLanes, inverse[e / 2], (t_column + e % 2) * 4);  // of token t_column + e % 2 + e / 2 * 8
      uint32_t right[4][2][2];                                               // [8 columns][high, low][word]
#pragma unroll
      for (int n = 0; n < 2; ++n) {
        uint32_t dout[4];
        load_right(dout, ring.tile(i, 1), n);
#pragma unroll
        for (int r = 0; r < 4; ++r) {
          float x, y;
          unpack<T>(dout[r], x, y);
          split<BFloat16>(x * scale[r % 2 * 2], y * scale[r % 2 * 2 + 1], right[2 * n + r / 2][0][r % 2],
                          right[2 * n + r / 2][1][r % 2]);
        }
      }
#pragma unroll
      for (int m = 0; m < 2; ++m) {
        uint32_t columns[4], terms[kTerms<T>][4];
        load_columns(columns, ring.tile(i, 0), m);
#pragma unroll
        for (int r = 0; r < 4; ++r) columns[r] = relu2<T>(columns[r] ^ column_sign[m][r % 2]);
        to_terms<T>(columns, terms);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(dS[m][n], terms, right[n]);
      }
    }
  }
  if constexpr (!kRowsOnly) {
    float* const to = a.partial + unit.index * kStateElements;
    store_state(to, dS, a.weight_q, channel);
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const float sum = column_sum(dz[n][e]);
        const int i = n * 8 + t_column + e;
        if (g == 0) store_global(to + kHeadDim * kHeadDim + i, sum * magnitude(a.weight_q, channel + i));
      }
    }
  }
}

// The arguments of the second kernel, and where kRowsOnly writes.
struct KeyArguments {
  LinearAttentionBackwardK a;
  float* rows;  // [B, H, N]
};

template <class T, bool kRowsOnly>
__global__ void __launch_bounds__(kTileThreads, kBlocks<T>) linear_attention_backward_k_kernel(KeyArguments args) {
  const LinearAttentionBackwardK& a = args.a;
  SharedMemory memory;
  const Shared<T> tiles = memory.take<T>(kTileWarps * kRingStages * 2 * kTileElements);
  const Unit unit(a.size);
  if (!unit.exists(a.size)) return;  // the whole warp
  const int g = threadIdx.x % kWarpSize / 4, t_column = threadIdx.x % 4 * 2;
  Ring<T, 2> ring(tiles, unit.tokens);
  ring.source(0, a.k, unit), ring.source(1, a.v, unit);
  ring.start();
  const int64_t channel = unit.h * kHeadDim, head = unit.b * a.size.H + unit.h;
  const float* const dstate = a.dstate + head * kStateElements;
  StateFragments for_k, for_v;
  load_state<true>(for_k, dstate, a.weight_k, channel);
  if (!kRowsOnly) load_state<false>(for_v, dstate, a.weight_k, channel);
  uint32_t sign[2][2];
  load_row_signs(sign, a.weight_k, channel);
  float dz[4][2];
#pragma unroll
  for (int n = 0; n < 4; ++n) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int i = n * 8 + t_column + e;
      dz[n][e] = load_global(dstate + kHeadDim * kHeadDim + i) * magnitude(a.weight_k, channel + i);
    }
  }
  TokenValues rstd(a.rstd_k, a.size, unit), row_sums(a.rstd_k == nullptr ? nullptr : a.row_sums, a.size, unit);
  const RowWriter<T> write_dk(a.dk, unit), write_dv(a.dv, unit);
  for (int i = 0; i < ring.tiles(); ++i) {
    ring.advance(i);
    uint32_t k[2][4];
    float dkhat[4][4], dv[4][4] = {};
#pragma unroll
    for (int n = 0; n < 4; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) dkhat[n][e] = dz[n][e % 2];
    }
#pragma unroll
    for (int step = 0; step < 2; ++step) {
      uint32_t v[4], terms[kTerms<T>][4];
      load_rows(v, ring.tile(i, 1), step);
      to_terms<T>(v, terms);
#pragma unroll
      for (int n = 0; n < 4; ++n) multiply(dkhat[n], terms, for_k[step][n]);
      load_rows(k[step], ring.tile(i, 0), step);
      uint32_t positive[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        k[step][r] ^= sign[step][r / 2];
        positive[r] = relu2<T>(k[step][r]);
      }
      if constexpr (!kRowsOnly) {
        to_terms<T>(positive, terms);
#pragma unroll
        for (int n = 0; n < 4; ++n) multiply(dv[n], terms, for_v[step][n]);
      }
    }
    const float own_rstd = rstd.take(i), own_row_sum = row_sums.take(i);
#pragma unroll
    for (int half = 0; half < 2; ++half) {  // token g, token g + 8
      const float row_rstd = a.rstd_k == nullptr ? 1.0f : __shfl_sync(kAllLanes, own_rstd, half * 8 + g);
      const float row_sum_all = __shfl_sync(kAllLanes, own_row_sum, half * 8 + g);
      const float through_norm = row_rstd * row_rstd * row_rstd / static_cast<float>(a.size.H * kHeadDim) * row_sum_all;
      uint32_t word_k[4], word_v[4];
      float c = 0.0f;
#pragma unroll
      for (int n = 0; n < 4; ++n) {
        float x[2], dk[2];
        unpack<T>(k[n / 2][n % 2 * 2 + half], x[0], x[1]);
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const float gradient = x[e] <= 0.0f ? 0.0f : dkhat[n][2 * half + e];
          c += x[e] * gradient;
          dk[e] = row_rstd * gradient;
          if (a.rstd_k != nullptr) dk[e] -= x[e] * through_norm;
        }
        word_k[n] = pack<T>(dk[0], dk[1]) ^ sign[n / 2][n % 2];
        word_v[n] = pack<T>(dv[n][2 * half] * row_rstd, dv[n][2 * half + 1] * row_rstd);
      }
      if constexpr (!kRowsOnly) {
        write_dk.write(i, half, word_k);
        write_dv.write(i, half, word_v);
      } else {
        c = row_sum(c);
        const int64_t token = unit.first + i * kTileTokens + half * 8 + g;
        if (t_column == 0 && token < unit.first + unit.tokens) store_global(args.rows + head * a.size.N + token, c);
      }
    }
  }
}

template <bool kRowsOnly>
cudaError_t launch(const LinearAttentionBackwardQ& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tile_blocks(a.size));
  if (a.q.p.dtype == Dtype::kBFloat16)
    return SANA_EXT_LAUNCH((linear_attention_backward_q_kernel<BFloat16, kRowsOnly>), blocks, kTileThreads,
                           (Ring<BFloat16, 2>::bytes()), stream, a);
  return SANA_EXT_LAUNCH((linear_attention_backward_q_kernel<Half, kRowsOnly>), blocks, kTileThreads,
                         (Ring<Half, 2>::bytes()), stream, a);
}

template <bool kRowsOnly>
cudaError_t launch(const KeyArguments& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>(tile_blocks(a.a.size));
  if (a.a.k.p.dtype == Dtype::kBFloat16)
    return SANA_EXT_LAUNCH((linear_attention_backward_k_kernel<BFloat16, kRowsOnly>), blocks, kTileThreads,
                           (Ring<BFloat16, 2>::bytes()), stream, a);
  return SANA_EXT_LAUNCH((linear_attention_backward_k_kernel<Half, kRowsOnly>), blocks, kTileThreads,
                         (Ring<Half, 2>::bytes()), stream, a);
}

bool is_tuned(const LinearAttentionBackwardK& a) { return takes_tiles(a.size, a.k, a.v, a.dk, a.dv); }

}  // namespace

bool is_tuned(const LinearAttentionBackwardQ& a) { return takes_tiles(a.size, a.q, a.dout, a.dq); }

cudaError_t linear_attention_backward_q(const LinearAttentionBackwardQ& a, cudaStream_t stream) {
  if (a.size.B == 0) return cudaSuccess;
  return is_tuned(a) ? launch<false>(a, stream) : linear_attention_backward_q_generic(a, stream);
}

cudaError_t linear_attention_backward_q_rows(const LinearAttentionBackwardQ& a, float* b, cudaStream_t stream) {
  if (a.size.B == 0) return cudaSuccess;
  if (!is_tuned(a)) return linear_attention_backward_q_rows_generic(a, b, stream);
  LinearAttentionBackwardQ rows = a;
  rows.work = b, rows.row_sums = nullptr;
  return launch<true>(rows, stream);
}

cudaError_t linear_attention_backward_k(const LinearAttentionBackwardK& a, cudaStream_t stream) {
  if (a.size.B == 0) return cudaSuccess;
  return is_tuned(a) ? launch<false>(KeyArguments{a, nullptr}, stream) : linear_attention_backward_k_generic(a, stream);
}

cudaError_t linear_attention_backward_k_rows(const LinearAttentionBackwardK& a, float* c, cudaStream_t stream) {
  if (a.size.B == 0) return cudaSuccess;
  if (!is_tuned(a)) return linear_attention_backward_k_rows_generic(a, c, stream);
  LinearAttentionBackwardK rows = a;
  rows.row_sums = nullptr;
  return launch<true>(KeyArguments{rows, c}, stream);
}

}  // namespace sana_ext::cuda
