// B batch, N tokens, C channels. Forward, tuned: one warp per row (b, n), the row in registers as fp32.
//   1. the row is read once, z = x + gate * y is stored and kept as stored,
//   2. mean of the distances from the row's first value (exact where all are equal), then variance around it and what
//      rounding left out of the mean (two passes over registers: no cancellation), by shuffles alone,
//   3. normalise, modulate, store.
// Bytes: each row tensor once; the [B, C] coefficients come from L2. Generic, for long or unaligned rows: one block per
// row, the row in shared memory, or read again where it is too long for that.
#include "norm_modulate.h"

#include "rows.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kWarpsPerBlock = 4;
constexpr int kThreads = kWarpsPerBlock * kWarpSize;

// From the mean square of the distances from a mean that lacks `rest`.
__device__ inline float rstd_of(float square, float rest, float eps) {
  const float variance = square - rest * rest;
  return rsqrtf((variance < 0.0f ? 0.0f : variance) + eps);
}

// kGroups groups of 8 channels per lane hold rows of up to 256 * kGroups channels.
template <int kGroups, bool kResidual, bool kNorm>
__global__ void __launch_bounds__(kThreads) norm_modulate_forward_kernel(NormModulateForward a) {
  const int lane = threadIdx.x % kWarpSize;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * kWarpsPerBlock + threadIdx.x / kWarpSize;
  if (row >= a.B * a.N) return;  // the whole warp
  const int64_t b = row / a.N, i_n = row % a.N;
  float z[kGroups][kGroup];
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t c = (g * kWarpSize + lane) * kGroup;
    if (c >= a.C) continue;
    load8(a.x, b * a.x_stride_b + i_n * a.x_stride_n + c, z[g]);
    if (kResidual) {
      float y[kGroup], gate[kGroup];
      load8(a.y, b * a.y_stride_b + i_n * a.y_stride_n + c, y);
      if (a.gate) load8(a.gate, b * a.gate_stride_b + c, gate);
#pragma unroll
      for (int i = 0; i < kGroup; ++i) z[g][i] += a.gate ? gate[i] * y[i] : y[i];
      store8(a.z, row * a.C + c, z[g]);
      if (kNorm) round8(a.z.dtype, z[g]);  // the norm sees what the next layer will see
    }
  }
  if (!kNorm) return;
  const float origin = __shfl_sync(kAllLanes, z[0][0], 0);
  float sum = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if ((g * kWarpSize + lane) * kGroup >= a.C) continue;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) sum += z[g][i] - origin;
  }
  const float mean = origin + warp_sum(sum) / static_cast<float>(a.C);
  float square = 0.0f, rest = 0.0f;
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    if ((g * kWarpSize + lane) * kGroup >= a.C) continue;
#pragma unroll
    for (int i = 0; i < kGroup; ++i) {
      const float d = z[g][i] - mean;
      square += d * d, rest += d;
    }
  }
  rest = warp_sum(rest) / static_cast<float>(a.C);
  const float rstd = rstd_of(warp_sum(square) / static_cast<float>(a.C), rest, a.eps);
#pragma unroll
  for (int g = 0; g < kGroups; ++g) {
    const int64_t c = (g * kWarpSize + lane) * kGroup;
    if (c >= a.C) continue;
    float scale[kGroup], shift[kGroup];
    load8(a.scale, b * a.scale_stride_b + c, scale);
    load8(a.shift, b * a.shift_stride_b + c, shift);
#pragma unroll
    for (int i = 0; i < kGroup; ++i) shift[i] += (z[g][i] - mean - rest) * rstd * (1.0f + scale[i]);
    store8(a.n, row * a.C + c, shift);
  }
  if (lane == 0) {
    store_global(a.mean + row, mean + rest);
    store_global(a.rstd + row, rstd);
  }
}

constexpr int kGenericThreads = 256;
constexpr int kGenericWarps = kGenericThreads / kWarpSize;
constexpr int64_t kCopiedChannels = 8192;  // longer rows are read again

__global__ void __launch_bounds__(kGenericThreads) norm_modulate_forward_generic_kernel(NormModulateForward a) {
  const bool copied = a.n && a.C <= kCopiedChannels;
  SharedMemory memory;
  const Shared<float> sums = memory.take<float>(kGenericWarps), squares = memory.take<float>(kGenericWarps),
                      rests = memory.take<float>(kGenericWarps);
  const Shared<float> copy = memory.take<float>(copied ? a.C : 0);
  for (int64_t row = blockIdx.x; row < a.B * a.N; row += gridDim.x) {
    const int64_t b = row / a.N, i_n = row % a.N;
    const int64_t x_start = b * a.x_stride_b + i_n * a.x_stride_n, y_start = b * a.y_stride_b + i_n * a.y_stride_n;
    // What is normalised; a thread reads back only what it wrote.
    const ConstPtr z = a.y ? ConstPtr(a.z) : a.x;
    const int64_t z_start = a.y ? row * a.C : x_start;
    const auto value_of = [&](int64_t c) {
      const float value = load_element(a.x, x_start + c);
      if (!a.y) return value;
      const float gate = a.gate ? load_element(a.gate, b * a.gate_stride_b + c) : 1.0f;
      return round_to(a.z.dtype, value + gate * load_element(a.y, y_start + c));
    };
    const float origin = value_of(0);
    float sum = 0.0f;
    for (int64_t c = threadIdx.x; c < a.C; c += kGenericThreads) {
      const float value = value_of(c);
      if (a.y) store_element(a.z, z_start + c, value);
      if (copied) copy[c] = value;
      sum += value - origin;
    }
    if (!a.n) continue;
    const float mean = origin + block_sum<kGenericWarps>(sum, sums) / static_cast<float>(a.C);
    float square = 0.0f, rest = 0.0f;
    for (int64_t c = threadIdx.x; c < a.C; c += kGenericThreads) {
      const float d = (copied ? copy[c] : load_element(z, z_start + c)) - mean;
      square += d * d, rest += d;
    }
    rest = block_sum<kGenericWarps>(rest, rests) / static_cast<float>(a.C);
    const float rstd = rstd_of(block_sum<kGenericWarps>(square, squares) / static_cast<float>(a.C), rest, a.eps);
    for (int64_t c = threadIdx.x; c < a.C; c += kGenericThreads) {
      const float value = copied ? copy[c] : load_element(z, z_start + c);
      const float scale = load_element(a.scale, b * a.scale_stride_b + c),
                  shift = load_element(a.shift, b * a.shift_stride_b + c);
      store_element(a.n, row * a.C + c, (value - mean - rest) * rstd * (1.0f + scale) + shift);
    }
    if (threadIdx.x == 0) {
      store_global(a.mean + row, mean + rest);
      store_global(a.rstd + row, rstd);
    }
    __syncthreads();  // the next row reuses the sums
  }
}

template <int kGroups>
cudaError_t launch_forward(const NormModulateForward& a, cudaStream_t stream) {
  const auto blocks = static_cast<unsigned>((a.B * a.N + kWarpsPerBlock - 1) / kWarpsPerBlock);
  if (!a.n)
    return SANA_EXT_LAUNCH((norm_modulate_forward_kernel<kGroups, true, false>), blocks, kThreads, 0, stream, a);
  if (!a.y)
    return SANA_EXT_LAUNCH((norm_modulate_forward_kernel<kGroups, false, true>), blocks, kThreads, 0, stream, a);
  return SANA_EXT_LAUNCH((norm_modulate_forward_kernel<kGroups, true, true>), blocks, kThreads, 0, stream, a);
}

}  // namespace

cudaError_t norm_modulate_forward(const NormModulateForward& a, cudaStream_t stream) {
  const int64_t rows = a.B * a.N;
  if (rows == 0 || a.C == 0) return cudaSuccess;
  const bool tuned = a.C % kGroup == 0 && a.C <= kNormModulateTunedChannels && rows < int64_t{1} << 31 &&
                     takes_groups(a.x, a.x_stride_b, a.x_stride_n) && takes_groups(a.y, a.y_stride_b, a.y_stride_n) &&
                     takes_groups(a.gate, a.gate_stride_b, 0) && takes_groups(a.shift, a.shift_stride_b, 0) &&
                     takes_groups(a.scale, a.scale_stride_b, 0) && takes_groups(a.z, 0, 0) && takes_groups(a.n, 0, 0);
  if (tuned) return a.C <= 1280 ? launch_forward<5>(a, stream) : launch_forward<9>(a, stream);
  const auto blocks = static_cast<unsigned>(rows < 65536 ? rows : 65536);
  const size_t shared = 3 * shared_size<float>(kGenericWarps) + (a.C <= kCopiedChannels ? shared_size<float>(a.C) : 0);
  return SANA_EXT_LAUNCH(norm_modulate_forward_generic_kernel, blocks, kGenericThreads, shared, stream, a);
}

}  // namespace sana_ext::cuda
