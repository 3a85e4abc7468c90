#include "adamw8bit.h"

#include "code8.cuh"
#include "lane_values.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kThreads = 256;
constexpr int kWarps = kThreads / kWarpSize;
constexpr int kValues = kLaneValues;
static_assert(kAdamW8bitBlock == kValues * kWarpSize);

__device__ inline void load_floats(const void* data, bool bf16, int64_t i, int count, bool whole, float (&v)[kValues]) {
  unpack_values(load_values(data, bf16, i, count, whole), bf16, v);
}

// The largest magnitude of the warp's block; its values become finite.
__device__ inline float largest_of(float (&v)[kValues]) {
  float largest = 0.0f;
#pragma unroll
  for (int j = 0; j < kValues; ++j) {
    v[j] = saturated(v[j]);
    const float magnitude = v[j] < 0.0f ? -v[j] : v[j];
    largest = magnitude > largest ? magnitude : largest;
  }
#pragma unroll
  for (int apart = kWarpSize / 2; apart > 0; apart /= 2) {
    const float other = __shfl_xor_sync(kAllLanes, largest, apart);
    largest = other > largest ? other : largest;
  }
  return largest;
}

// The tensor of a block, searched among all of them.
__device__ inline int find(const AdamW8bitLaunch& a, uint32_t block) {
  int low = 0, count = a.count;
  while (count > 1) {
    const int half = count / 2;
    const bool upper = a.tensors[low + half].first_block <= block;
    low += upper ? half : 0;
    count = upper ? count - half : half;
  }
  return low;
}

// Calls f(tensor, its number, this lane's first element, its values, whether the block is whole and aligned) for the
// blocks of this warp: every kWarps-th of the thread block's chunk, so that neighbouring warps read neighbouring
// memory.
template <class F>
__device__ inline void for_each_block(const AdamW8bitLaunch& a, const F& f) {
  const uint32_t begin = blockIdx.x * static_cast<uint32_t>(kAdamW8bitChunk);
  const uint32_t end = begin + kAdamW8bitChunk < a.blocks ? begin + static_cast<uint32_t>(kAdamW8bitChunk) : a.blocks;
  int i = find(a, begin);
  for (uint32_t block = begin + threadIdx.x / kWarpSize; block < end; block += kWarps) {
    while (i + 1 < a.count && a.tensors[i + 1].first_block <= block) ++i;
    const AdamW8bitTensor& t = a.tensors[i];
    const int64_t at = (block - t.first_block) * kAdamW8bitBlock;
    const int64_t first = at + threadIdx.x % kWarpSize * kValues, left = t.n - first;
    f(t, i, first,
      static_cast<int>(left < 0         ? 0
                       : left < kValues ? left
                                        : kValues),
      t.aligned && at + kAdamW8bitBlock <= t.n);
  }
}

__global__ void __launch_bounds__(kThreads) adamw8bit_step_kernel(AdamW8bitLaunch a) {
  SharedMemory memory;
  const SharedCode code1 = take_code(memory), code2 = take_code(memory);
  fill(code1, true);
  fill(code2, false);
  __syncthreads();
  if (load_global(a.found_inf) != 0.0f) return;
  const int lane = static_cast<int>(threadIdx.x) % kWarpSize;
  for_each_block(a, [&](const AdamW8bitTensor& t, int number, int64_t i, int count, bool whole) {
    const double* h = a.hyper + static_cast<int64_t>(number) * kAdamW8bitColumns;
    const auto hyper = [&](int column) { return static_cast<float>(load_global(h + column)); };
    const float beta1 = hyper(0), rest1 = hyper(1), beta2 = hyper(2), rest2 = hyper(3), size = hyper(4),
                root = hyper(5), eps = hyper(6), keep = hyper(7), factor = hyper(8);
    const int64_t block = i / kAdamW8bitBlock;
    float p[kValues], g[kValues], m[kValues], v[kValues];
    load_floats(t.p, t.p_bf16, i, count, whole, p);
    load_floats(t.g, t.g_bf16, i, count, whole, g);
    const bool bytes = t.absmax1 != nullptr;
    if (bytes) {
      const uint64_t codes1 = load_codes(static_cast<const uint8_t*>(t.state1), i, count, whole, kCodeZero);
      const uint64_t codes2 = load_codes(static_cast<const uint8_t*>(t.state2), i, count, whole, 0);
      const float scale1 = load_global(t.absmax1 + block), scale2 = load_global(t.absmax2 + block);
#pragma unroll
      for (int j = 0; j < kValues; ++j) {
        const int k = static_cast<int>(codes1 >> 8 * j & 0xff) - kCodeZero;
        const float magnitude = code1.magnitude[k < 0 ? -k : k];
        m[j] = (k < 0 ? -magnitude : magnitude) * scale1;
        const int k2 = static_cast<int>(codes2 >> 8 * j & 0xff);
        v[j] = code2.magnitude[k2 == 0 && m[j] != 0.0f ? 1 : k2] * scale2;
      }
    } else {
      load_floats(t.state1, false, i, count, whole, m);
      load_floats(t.state2, false, i, count, whole, v);
    }
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      g[j] *= factor;
      m[j] = m[j] * beta1 + g[j] * rest1;
      v[j] = v[j] * beta2 + g[j] * g[j] * rest2;
      const float step = m[j] / (sqrtf(v[j]) * root + eps) * size;
      if (a.bitsandbytes_cuda) {
        p[j] -= step;
        p[j] = (t.p_bf16 ? bfloat16_to_float(float_to_bfloat16(p[j])) : p[j]) * keep;
      } else {
        p[j] = p[j] * keep - step;
      }
    }
    if (t.p_bf16)
      store_bf16(static_cast<uint16_t*>(t.p), i, count, whole, a.seeds == nullptr ? -1 : load_global(a.seeds + number),
                 p);
    else
      store_floats(static_cast<float*>(t.p), i, count, whole, p);
    if (!bytes) {
      store_floats(static_cast<float*>(t.state1), i, count, whole, m);
      store_floats(static_cast<float*>(t.state2), i, count, whole, v);
      return;
    }
    const float scale1 = code_scale(largest_of(m)), scale2 = unsigned_code_scale(largest_of(v));
    const float inverse1 = code_inverse(scale1), inverse2 = code_inverse(scale2);
    uint64_t codes1 = 0, codes2 = 0;
#pragma unroll
    for (int j = 0; j < kValues; ++j) {
      uint64_t code = encode_signed(code1, m[j] * inverse1);
      if (a.bitsandbytes_cuda && code == kCodeZero && m[j] < 0.0f) code = kCodeZero - 1;
      codes1 |= code << 8 * j;
      codes2 |= static_cast<uint64_t>(encode_unsigned(code2, v[j], inverse2)) << 8 * j;
    }
    store_codes(static_cast<uint8_t*>(t.state1), i, count, whole, codes1);
    store_codes(static_cast<uint8_t*>(t.state2), i, count, whole, codes2);
    if (lane == 0) store_global(t.absmax1 + block, scale1), store_global(t.absmax2 + block, scale2);
  });
}

__global__ void __launch_bounds__(kThreads) adamw8bit_check_kernel(AdamW8bitLaunch a) {
  SharedMemory memory;
  const Shared<float> sums = memory.take<float>(kWarps);
  const float factor = load_global(a.factor);
  float sum = 0.0f;  // NaN as soon as a product is not finite: 0 * infinity
  for_each_block(a, [&](const AdamW8bitTensor& t, int, int64_t i, int count, bool whole) {
    float g[kValues];
    load_floats(t.g, t.g_bf16, i, count, whole, g);
#pragma unroll
    for (int j = 0; j < kValues; ++j) sum += g[j] * factor * 0.0f;
  });
  const float total = block_sum<kWarps>(sum, sums);
  if (threadIdx.x == 0) store_global(a.flags + blockIdx.x, total == total ? 0 : 1);
}

__global__ void __launch_bounds__(kThreads) adamw8bit_found_kernel(AdamW8bitFound a) {
  SharedMemory memory;
  const Shared<float> sums = memory.take<float>(kWarps);
  float found = 0.0f;
  for (int64_t i = threadIdx.x; i < a.count; i += kThreads) found += load_global(a.flags + i) != 0 ? 1.0f : 0.0f;
  const float total = block_sum<kWarps>(found, sums);
  if (threadIdx.x == 0 && total != 0.0f) store_global(a.found_inf, 1.0f);
}

unsigned chunks(const AdamW8bitLaunch& a) {
  return (a.blocks + static_cast<uint32_t>(kAdamW8bitChunk) - 1) / static_cast<uint32_t>(kAdamW8bitChunk);
}

}  // namespace

cudaError_t adamw8bit_step(const AdamW8bitLaunch& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  return SANA_EXT_LAUNCH(adamw8bit_step_kernel, chunks(a), kThreads, 2 * kCodeBytes, stream, a);
}

cudaError_t adamw8bit_check(const AdamW8bitLaunch& a, cudaStream_t stream) {
  if (a.blocks == 0) return cudaSuccess;
  return SANA_EXT_LAUNCH(adamw8bit_check_kernel, chunks(a), kThreads, shared_size<float>(kWarps), stream, a);
}

cudaError_t adamw8bit_found(const AdamW8bitFound& a, cudaStream_t stream) {
  return SANA_EXT_LAUNCH(adamw8bit_found_kernel, 1u, kThreads, shared_size<float>(kWarps), stream, a);
}

}  // namespace sana_ext::cuda
