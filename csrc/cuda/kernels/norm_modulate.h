// LayerNorm and modulation on the GPU: n = (x - mean) * rstd * (1 + scale) + shift, statistics in fp32.
#pragma once
#include "../../common/dtype.h"
#include "runtime.h"

namespace sana_ext::cuda {

// Register budget, checked by `make kernels`: norm_modulate_forward_kernel 48

struct NormModulateForward {
  int64_t B, N, C;
  float eps;
  ConstPtr x;  // [B, N, C], last dimension dense
  int64_t x_stride_b, x_stride_n;
  ConstPtr shift, scale;  // [B, C]
  int64_t shift_stride_b, scale_stride_b;
  Ptr n;               // [B, N, C] dense
  float *mean, *rstd;  // [B, N]
};

// One block per row. Rows of up to kNormModulateMaxChannels channels are kept in shared memory, longer ones are read
// again.
constexpr int64_t kNormModulateMaxChannels = 8192;
cudaError_t norm_modulate_forward(const NormModulateForward& args, cudaStream_t stream);

}  // namespace sana_ext::cuda
