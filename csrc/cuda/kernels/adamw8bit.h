// AdamW with 8-bit states on the GPU, many parameters in one launch; the formulas are
// sana_ext/reference/adamw8bit.py's.
#pragma once
#include "../../common/dtype.h"
#include "runtime.h"

namespace sana_ext::cuda {

// Register budget, checked by `make kernels`: adamw8bit_step_kernel 72, adamw8bit_check_kernel 40
// Register budget, checked by `make kernels`: adamw8bit_found_kernel 40
// Machine code, checked by `make kernels`: adamw8bit_step_kernel: LDG.128 STG.128 LDG.64 STG.64

constexpr int64_t kAdamW8bitBlock = 256;  // values that share a scale: one warp, 8 values a lane
constexpr int64_t kAdamW8bitChunk = 64;   // blocks of one thread block
constexpr int kAdamW8bitColumns = 9;      // of hyper

// One parameter. All tensors are dense; the states' elements are bytes with scales, or fp32 without.
struct AdamW8bitTensor {
  void* p;                   // [n] fp32 or bf16
  const void* g;             // [n] fp32 or bf16
  void *state1, *state2;     // [n] uint8 or fp32
  float *absmax1, *absmax2;  // [ceil(n / 256)]; nullptr: the states are fp32
  int64_t n;
  uint32_t first_block;          // blocks of the parameters before, in this launch
  bool p_bf16, g_bf16, aligned;  // aligned: all but the scales start at multiples of 16 bytes
};

// As many parameters as the 32,764 bytes of a kernel's arguments have room for: those of the 1600M model.
#ifdef SANA_EXT_EMULATOR
constexpr int kAdamW8bitTensors = 16;
#else
constexpr int kAdamW8bitTensors = 500;
#endif

struct AdamW8bitLaunch {
  int32_t count;
  uint32_t blocks;
  const double* hyper;     // [count, 9]: beta1, rest1, beta2, rest2, size, root, eps, keep, factor
  const int64_t* seeds;    // [count] of stochastic rounding, -1: to the nearest; or nullptr
  const float* found_inf;  // [1]; with any value but 0 nothing is touched
  const float* factor;     // [1], of the check
  int32_t* flags;          // [ceil(blocks / 64)], of the check: 1 where a g * factor is not finite
  bool bitsandbytes_cuda;
  AdamW8bitTensor tensors[kAdamW8bitTensors];
};
static_assert(sizeof(AdamW8bitLaunch) <= 32764);
cudaError_t adamw8bit_step(const AdamW8bitLaunch& args, cudaStream_t stream);
cudaError_t adamw8bit_check(const AdamW8bitLaunch& args, cudaStream_t stream);

// found_inf becomes 1 if a flag is set.
struct AdamW8bitFound {
  int64_t count;
  const int32_t* flags;  // [count]
  float* found_inf;      // [1]
};
cudaError_t adamw8bit_found(const AdamW8bitFound& args, cudaStream_t stream);

}  // namespace sana_ext::cuda
