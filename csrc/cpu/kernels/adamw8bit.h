// AdamW with 8-bit states, all parameters in one pass; the formulas are sana_ext/reference/adamw8bit.py's.
#pragma once
#include "../../common/dtype.h"
#include "isa.h"

namespace sana_ext::cpu {

constexpr int64_t kAdamW8bitBlock = 256;  // values that share a scale, and the work item

// Numbers of one parameter: m = beta1 m + rest1 g, v = beta2 v + rest2 g^2, p = p keep - size m / (sqrt(v) root + eps).
struct AdamW8bitHyper {
  float beta1, rest1, beta2, rest2, size, root, eps, keep, factor;  // factor: of the gradient
};

// One parameter. All tensors are dense; the states' elements are bytes with scales, or fp32 without.
struct AdamW8bitTensor {
  int64_t n, first_block;    // elements; blocks of the parameters before
  Ptr p;                     // [n] fp32 or bf16
  ConstPtr g;                // [n] fp32 or bf16
  void *state1, *state2;     // [n] uint8 or fp32
  float *absmax1, *absmax2;  // [ceil(n / 256)]; nullptr: the states are fp32
  AdamW8bitHyper h;
  int64_t seed;  // of stochastic rounding; -1: to the nearest
};

struct AdamW8bit {
  int64_t count;
  const AdamW8bitTensor* tensors;  // [count], none of them empty
  bool bitsandbytes_cuda;          // the order of bitsandbytes' CUDA kernel
};
SANA_EXT_KERNEL(adamw8bit_step, AdamW8bit)  // items are the blocks of all parameters

struct AdamW8bitCheck {
  int64_t count;
  const AdamW8bitTensor* tensors;  // n, first_block and g count
  float factor;
  int32_t* found;  // set to 1 where g * factor is not finite
};
SANA_EXT_KERNEL(adamw8bit_check, AdamW8bitCheck)  // items are the blocks of all parameters

}  // namespace sana_ext::cpu
