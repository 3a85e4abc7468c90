// The sums around linear_attention's passes: over the channels of a token, over parts, over states. Each in a fixed
// order.
#include "linear_attention.h"
#include "rows.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kWarps = 8, kThreads = kWarps * kWarpSize;

// A warp per token; kGroups: every head starts at a multiple of 16 bytes and has whole groups of 8 channels.
template <bool kGroups>
__global__ void __launch_bounds__(kThreads) row_rstd_kernel(RowRstd a) {
  const LinearAttentionSize& s = a.size;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t C = s.H * s.D;
  const int D = static_cast<int>(s.D);
  for (int64_t row = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize; row < s.B * s.N;
       row += static_cast<int64_t>(gridDim.x) * kWarps) {
    const int64_t start = row / s.N * a.x.stride_b + row % s.N * a.x.stride_n;
    float sum = 0.0f;
    if (kGroups) {
#pragma unroll 3
      for (int c = lane * kGroup; c < static_cast<int>(C); c += kWarpSize * kGroup) {
        float x[kGroup];
        load8(a.x.p, start + c / D * a.x.stride_h + c % D, x);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) sum += x[i] * x[i];
      }
    } else {
      for (int64_t c = lane; c < C; c += kWarpSize) {
        const float x = load_element(a.x.p, start + c / s.D * a.x.stride_h + c % s.D);
        sum += x * x;
      }
    }
    sum = warp_sum(sum);
    if (lane == 0) store_global(a.rstd + row, rsqrtf(sum / static_cast<float>(C) + a.norm_eps));
  }
}

// A block sums 32 neighbouring numbers, each warp every eighth part of them.
__global__ void __launch_bounds__(kThreads) sum_parts_kernel(PartSums a) {
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kThreads);
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  const int64_t tiles = (a.count + kWarpSize - 1) / kWarpSize;
  const int64_t b = blockIdx.x / tiles, i = blockIdx.x % tiles * kWarpSize + lane;
  float sum = 0.0f;
  if (i < a.count) {
#pragma unroll 4
    for (int64_t p = warp; p < a.parts; p += kWarps) sum += load_global(a.from + (b * a.parts + p) * a.count + i);
  }
  slots[warp * kWarpSize + lane] = sum;
  __syncthreads();
  if (warp != 0 || i >= a.count) return;
  float total = 0.0f;
#pragma unroll
  for (int w = 0; w < kWarps; ++w) total += slots[w * kWarpSize + lane];
  store_global(a.out + b * a.count + i, total);
}

// A warp per channel.
__global__ void __launch_bounds__(kThreads) weight_gradients_kernel(WeightGradients a) {
  const int64_t D = a.size.D, C = a.size.H * D, elements = (D + 1) * D;
  const int lane = threadIdx.x % kWarpSize;
  const int64_t c = static_cast<int64_t>(blockIdx.x) * kWarps + threadIdx.x / kWarpSize;
  if (c >= C) return;  // the whole warp
  const int64_t h = c / D, i = c % D;
  float sum = 0.0f;
  for (int64_t b = 0; b < a.size.B; ++b) {
    const float* const S = a.state + (b * a.size.H + h) * elements;
    const float* const dS = a.dstate + (b * a.size.H + h) * elements;
    for (int64_t j = lane; j < D; j += kWarpSize) sum += load_global(S + i * D + j) * load_global(dS + i * D + j);
    if (lane == 0) sum += load_global(S + D * D + i) * load_global(dS + D * D + i);
  }
  sum = warp_sum(sum);
  if (lane != 0) return;
  const auto store = [&](ConstPtr weight, Ptr gradient) {
    if (!gradient) return;
    const float w = load_element(weight, c);
    store_element(gradient, c, w == 0.0f ? sum * 0.0f : sum / w);  // relu(0) has no slope here, as in torch
  };
  store(a.weight_q, a.dweight_q);
  store(a.weight_k, a.dweight_k);
}

}  // namespace

cudaError_t row_rstd(const RowRstd& a, cudaStream_t stream) {
  const int64_t wanted = (a.size.B * a.size.N + kWarps - 1) / kWarps;
  if (wanted == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(wanted < 1 << 20 ? wanted : 1 << 20);
  const bool groups = a.size.D % kGroup == 0 && a.x.stride_h % kGroup == 0 && a.size.H * a.size.D < int64_t{1} << 30 &&
                      takes_groups(a.x.p, a.x.stride_b, a.x.stride_n);
  if (groups) return SANA_EXT_LAUNCH(row_rstd_kernel<true>, blocks, kThreads, 0, stream, a);
  return SANA_EXT_LAUNCH(row_rstd_kernel<false>, blocks, kThreads, 0, stream, a);
}

cudaError_t sum_parts(const PartSums& a, cudaStream_t stream) {
  const int64_t blocks = a.B * ((a.count + kWarpSize - 1) / kWarpSize);
  if (blocks == 0) return cudaSuccess;
  return SANA_EXT_LAUNCH(sum_parts_kernel, static_cast<unsigned>(blocks), kThreads, shared_size<float>(kThreads),
                         stream, a);
}

cudaError_t weight_gradients(const WeightGradients& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((a.size.H * a.size.D + kWarps - 1) / kWarps);
  return SANA_EXT_LAUNCH(weight_gradients_kernel, blocks, kThreads, 0, stream, a);
}

}  // namespace sana_ext::cuda
