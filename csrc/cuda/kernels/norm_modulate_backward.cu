// B batch, N tokens, C channels. Tuned: a block owns rows_per_block rows of one image, each thread 8 channels of them.
//   1. one or two rows are read at once; their sums of g = dn * (1 + scale) and of g * xhat meet in one barrier,
//   2. dz_total = dz + rstd * (g - mean(g) - xhat * mean(g * xhat)); dx and dy are stored,
//   3. the column sums dshift, dscale, dgate stay in the thread's registers and are written once, as partial sums.
// sum_partials adds the blocks' sums in a fixed order. Bytes: each row tensor once, and 12 C per block of rows.
// Generic, for long or unaligned rows: the threads stride over the channels, and each adds its columns up in `partial`.
#include "norm_modulate.h"
#include "rows.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kThreads = kNormModulateTunedChannels / kGroup;  // at most; a block has as many as a row needs
constexpr int kMaxWarps = kThreads / kWarpSize;
constexpr int kMaxRows = 2, kMaxSums = 2 * kMaxRows;

// kNorm: dn is given, dx wanted; kResidual: dz and y are given, dy wanted.
template <bool kNorm, bool kResidual>
__global__ void __launch_bounds__(kThreads, 2) norm_modulate_backward_kernel(NormModulateBackward a) {
  // Rows per turn: as many as the registers of two blocks per multiprocessor hold.
  constexpr int kRows = kNorm && kResidual ? 1 : kMaxRows, kSums = 2 * kRows;
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(2 * kMaxSums * kMaxWarps);  // two sets: one barrier per turn is enough
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize, warps = blockDim.x / kWarpSize;
  const int64_t blocks = (a.N + a.rows_per_block - 1) / a.rows_per_block;
  const int64_t b = blockIdx.x / blocks, first = blockIdx.x % blocks * a.rows_per_block;
  const int64_t last = first + a.rows_per_block < a.N ? first + a.rows_per_block : a.N;
  const int64_t c = threadIdx.x * kGroup;
  const bool active = c < a.C;
  float scale[kGroup] = {};
  if (kNorm && active) load8(a.scale, b * a.scale_stride_b + c, scale);
  float dshift[kGroup] = {}, dscale[kGroup] = {}, dgate[kGroup] = {};
  int set = 0;
  for (int64_t start = first; start < last; start += kRows, set ^= 1) {
    float g[kRows][kGroup] = {}, xhat[kRows][kGroup] = {}, rstd[kRows] = {};
    float sums[kSums] = {};
    if (kNorm) {
#pragma unroll
      for (int r = 0; r < kRows; ++r) {
        const int64_t i_n = start + r;
        if (i_n >= last || !active) continue;
        rstd[r] = load_global(a.rstd + b * a.N + i_n);
        const float mean = load_global(a.mean + b * a.N + i_n);
        load8(a.dn, b * a.dn_stride_b + i_n * a.dn_stride_n + c, g[r]);
        load8(a.z, b * a.z_stride_b + i_n * a.z_stride_n + c, xhat[r]);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          xhat[r][i] = (xhat[r][i] - mean) * rstd[r];
          dshift[i] += g[r][i];
          dscale[i] += g[r][i] * xhat[r][i];
          g[r][i] *= 1.0f + scale[i];
          sums[2 * r] += g[r][i];
          sums[2 * r + 1] += g[r][i] * xhat[r][i];
        }
      }
      const Shared<float> slot = slots + set * kMaxSums * kMaxWarps;
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        sums[s] = warp_sum(sums[s]);
        if (lane == 0) slot[s * kMaxWarps + warp] = sums[s];
      }
      __syncthreads();
#pragma unroll
      for (int s = 0; s < kSums; ++s) {
        sums[s] = 0.0f;
        for (int w = 0; w < warps; ++w) sums[s] += slot[s * kMaxWarps + w];
        sums[s] /= static_cast<float>(a.C);
      }
    }
#pragma unroll
    for (int r = 0; r < kRows; ++r) {
      const int64_t i_n = start + r;
      if (i_n >= last || !active) continue;
      float total[kGroup] = {};
      if (kResidual) load8(a.dz, b * a.dz_stride_b + i_n * a.dz_stride_n + c, total);
      if (kNorm) {
#pragma unroll
        for (int i = 0; i < kGroup; ++i) total[i] += (g[r][i] - sums[2 * r] - xhat[r][i] * sums[2 * r + 1]) * rstd[r];
        store8(a.dx, (b * a.N + i_n) * a.C + c, total);
      }
      if (!kResidual) continue;
      if (a.gate) {
        float y[kGroup], gate[kGroup];  // from L1: there are no registers to keep the gate in
        load8(a.gate, b * a.gate_stride_b + c, gate);
        load8(a.y, b * a.y_stride_b + i_n * a.y_stride_n + c, y);
#pragma unroll
        for (int i = 0; i < kGroup; ++i) {
          dgate[i] += total[i] * y[i];
          total[i] *= gate[i];
        }
      }
      store8(a.dy, (b * a.N + i_n) * a.C + c, total);
    }
  }
  if (!active) return;
  const Ptr partial{a.partial, Dtype::kFloat32};
  const int64_t to = static_cast<int64_t>(blockIdx.x) * 3 * a.C + c;
  if (kNorm) store8(partial, to, dshift), store8(partial, to + a.C, dscale);
  if (kResidual && a.gate) store8(partial, to + 2 * a.C, dgate);
}

constexpr int kGenericThreads = 256;
constexpr int kGenericWarps = kGenericThreads / kWarpSize;

__global__ void __launch_bounds__(kGenericThreads) norm_modulate_backward_generic_kernel(NormModulateBackward a) {
  SharedMemory memory;
  const Shared<float> slots_g = memory.take<float>(kGenericWarps), slots_gx = memory.take<float>(kGenericWarps);
  const int64_t blocks = (a.N + a.rows_per_block - 1) / a.rows_per_block;
  const int64_t b = blockIdx.x / blocks, first = blockIdx.x % blocks * a.rows_per_block;
  const int64_t last = first + a.rows_per_block < a.N ? first + a.rows_per_block : a.N;
  float* const dshift = a.partial + static_cast<int64_t>(blockIdx.x) * 3 * a.C;
  const auto add = [&](float* sum, int64_t i_n, float value) {  // each column belongs to one thread
    store_global(sum, i_n == first ? value : load_global(sum) + value);
  };
  for (int64_t i_n = first; i_n < last; ++i_n) {
    const int64_t row = b * a.N + i_n;
    const int64_t dn_start = b * a.dn_stride_b + i_n * a.dn_stride_n, z_start = b * a.z_stride_b + i_n * a.z_stride_n;
    const float mean = a.dn ? load_global(a.mean + row) : 0.0f, rstd = a.dn ? load_global(a.rstd + row) : 0.0f;
    float mean_g = 0.0f, mean_gx = 0.0f;
    if (a.dn) {
      for (int64_t c = threadIdx.x; c < a.C; c += kGenericThreads) {
        const float dn = load_element(a.dn, dn_start + c), xhat = (load_element(a.z, z_start + c) - mean) * rstd;
        const float g = dn * (1.0f + load_element(a.scale, b * a.scale_stride_b + c));
        mean_g += g, mean_gx += g * xhat;
        add(dshift + c, i_n, dn);
        add(dshift + a.C + c, i_n, dn * xhat);
      }
      mean_g = block_sum<kGenericWarps>(mean_g, slots_g) / static_cast<float>(a.C);
      mean_gx = block_sum<kGenericWarps>(mean_gx, slots_gx) / static_cast<float>(a.C);
    }
    for (int64_t c = threadIdx.x; c < a.C; c += kGenericThreads) {
      float total = a.dz ? load_element(a.dz, b * a.dz_stride_b + i_n * a.dz_stride_n + c) : 0.0f;
      if (a.dn) {
        const float xhat = (load_element(a.z, z_start + c) - mean) * rstd;
        const float g = load_element(a.dn, dn_start + c) * (1.0f + load_element(a.scale, b * a.scale_stride_b + c));
        total += (g - mean_g - xhat * mean_gx) * rstd;
        store_element(a.dx, row * a.C + c, total);
      }
      if (a.gate) {
        add(dshift + 2 * a.C + c, i_n, total * load_element(a.y, b * a.y_stride_b + i_n * a.y_stride_n + c));
        total *= load_element(a.gate, b * a.gate_stride_b + c);
      }
      if (a.dy) store_element(a.dy, row * a.C + c, total);
    }
    __syncthreads();  // the next row reuses the slots
  }
}

constexpr int kSlices = 8;

// A block sums 32 columns of one output, each warp every eighth partial sum.
__global__ void __launch_bounds__(kSlices* kWarpSize) sum_partials_kernel(PartialSums a) {
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kSlices * kWarpSize);
  const int lane = threadIdx.x % kWarpSize, slice = threadIdx.x / kWarpSize;
  const int64_t tiles = (a.C + kWarpSize - 1) / kWarpSize;
  const int64_t c = blockIdx.x % tiles * kWarpSize + lane, b = blockIdx.x / tiles / 3;
  const int r = static_cast<int>(blockIdx.x / tiles % 3);
  const Ptr out = r == 0 ? a.out[0] : r == 1 ? a.out[1] : a.out[2];
  if (!out) return;
  float sum = 0.0f;
  if (c < a.C) {
#pragma unroll 4
    for (int64_t block = slice; block < a.blocks; block += kSlices)
      sum += load_global(a.partial + ((b * a.blocks + block) * 3 + r) * a.C + c);
  }
  slots[slice * kWarpSize + lane] = sum;
  __syncthreads();
  if (slice != 0 || c >= a.C) return;
  float total = 0.0f;
#pragma unroll
  for (int i = 0; i < kSlices; ++i) total += slots[i * kWarpSize + lane];
  store_element(out, b * a.C + c, total);
}

}  // namespace

cudaError_t norm_modulate_backward(const NormModulateBackward& a, cudaStream_t stream) {
  const int64_t count = a.B * ((a.N + a.rows_per_block - 1) / a.rows_per_block);
  if (count == 0 || a.C == 0) return cudaSuccess;
  const auto blocks = static_cast<unsigned>(count);
  const bool tuned =
      a.C % kGroup == 0 && a.C <= kNormModulateTunedChannels && takes_groups(a.dz, a.dz_stride_b, a.dz_stride_n) &&
      takes_groups(a.dn, a.dn_stride_b, a.dn_stride_n) && takes_groups(a.z, a.z_stride_b, a.z_stride_n) &&
      takes_groups(a.y, a.y_stride_b, a.y_stride_n) && takes_groups(a.gate, a.gate_stride_b, 0) &&
      takes_groups(a.scale, a.scale_stride_b, 0) && takes_groups(a.dx, 0, 0) && takes_groups(a.dy, 0, 0);
  if (!tuned) {
    const size_t shared = 2 * shared_size<float>(kGenericWarps);
    return SANA_EXT_LAUNCH(norm_modulate_backward_generic_kernel, blocks, kGenericThreads, shared, stream, a);
  }
  const auto threads = static_cast<unsigned>((a.C / kGroup + kWarpSize - 1) / kWarpSize * kWarpSize);
  const size_t shared = shared_size<float>(2 * kMaxSums * kMaxWarps);
  if (!a.dn) return SANA_EXT_LAUNCH((norm_modulate_backward_kernel<false, true>), blocks, threads, shared, stream, a);
  if (!a.y) return SANA_EXT_LAUNCH((norm_modulate_backward_kernel<true, false>), blocks, threads, shared, stream, a);
  return SANA_EXT_LAUNCH((norm_modulate_backward_kernel<true, true>), blocks, threads, shared, stream, a);
}

cudaError_t sum_partials(const PartialSums& a, cudaStream_t stream) {
  const int64_t blocks = a.B * 3 * ((a.C + kWarpSize - 1) / kWarpSize);
  if (blocks == 0) return cudaSuccess;
  return SANA_EXT_LAUNCH(sum_partials_kernel, static_cast<unsigned>(blocks), kSlices * kWarpSize,
                         shared_size<float>(kSlices * kWarpSize), stream, a);
}

}  // namespace sana_ext::cuda
