// What the kernels are made of; the only home of warp intrinsics and inline PTX.
#pragma once
#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include "../../common/dtype.h"

namespace sana_ext::cuda {

constexpr int kWarpSize = 32;

// Sum over the 32 lanes of a warp, in every lane; the order is fixed.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

// Sum over a block of kWarps warps, in every thread. `slots` is kWarps floats of shared memory, reusable after the next
// barrier.
template <int kWarps>
__device__ inline float block_sum(float value, float* slots) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) slots[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += slots[warp];
  return total;
}

// Element i of a tensor as float. The dtype is uniform over the grid, so the branch does not diverge.
__device__ inline float load_element(ConstPtr p, int64_t i) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return __bfloat162float(static_cast<const __nv_bfloat16*>(p.data)[i]);
    case Dtype::kFloat16:
      return __half2float(static_cast<const __half*>(p.data)[i]);
    default:
      return static_cast<const float*>(p.data)[i];
  }
}

__device__ inline void store_element(Ptr p, int64_t i, float value) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      static_cast<__nv_bfloat16*>(p.data)[i] = __float2bfloat16_rn(value);
      return;
    case Dtype::kFloat16:
      static_cast<__half*>(p.data)[i] = __float2half_rn(value);
      return;
    default:
      static_cast<float*>(p.data)[i] = value;
  }
}

}  // namespace sana_ext::cuda
