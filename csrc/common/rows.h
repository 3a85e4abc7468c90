// Tensors of heads as kernels see them. Torch-free.
#pragma once
#include "dtype.h"

namespace sana_ext {

// A [B, N, H, D] tensor whose last dimension is dense.
template <class Pointer>
struct LinearAttentionRows {
  Pointer p;
  int64_t stride_b, stride_n, stride_h;
};

}  // namespace sana_ext
