// Residual, gate, LayerNorm and modulation on the GPU; the formulas are sana_ext/reference/norm_modulate.py's.
// One family of kernels serves norm_modulate (no y), gated_residual (no n) and residual_norm_modulate. Accumulators,
// statistics and partial sums are fp32.
#pragma once
#include "../../common/dtype.h"
#include "runtime.h"

namespace sana_ext::cuda {

// Register budget, checked by `make kernels`: norm_modulate_forward_kernel 128, norm_modulate_forward_generic_kernel 48
// Register budget, checked by `make kernels`: norm_modulate_backward_kernel 96, sum_partials_kernel 40
// Register budget, checked by `make kernels`: norm_modulate_backward_generic_kernel 80
// Machine code, checked by `make kernels`: norm_modulate_forward_kernel<*>: LDG.128 STG.128
// Machine code, checked by `make kernels`: norm_modulate_backward_kernel<*>: LDG.128 STG.128

// Rows of up to kNormModulateTunedChannels channels, a multiple of 8, with every pointer and row a multiple of 16
// bytes, take the tuned kernels; other rows the generic ones.
constexpr int64_t kNormModulateTunedChannels = 2304;

// z = x + gate * y;  n = (z - mean) * rstd * (1 + scale) + shift.
struct NormModulateForward {
  int64_t B, N, C;
  float eps;
  ConstPtr x;  // [B, N, C], last dimension dense
  int64_t x_stride_b, x_stride_n;
  ConstPtr y;  // [B, N, C] or absent
  int64_t y_stride_b, y_stride_n;
  ConstPtr gate;  // [B, C] or absent (gate = 1)
  int64_t gate_stride_b;
  ConstPtr shift, scale;  // [B, C]; absent together with n
  int64_t shift_stride_b, scale_stride_b;
  Ptr z;               // [B, N, C] dense; absent without y
  Ptr n;               // [B, N, C] dense, or absent
  float *mean, *rstd;  // [B, N]; nullptr without n
};
cudaError_t norm_modulate_forward(const NormModulateForward& args, cudaStream_t stream);

// dz_total = dz + dLN(dn);  dx = dz_total;  dy = gate * dz_total;  and over rows_per_block rows of one image each
// partial sums of dshift = sum dn, dscale = sum dn * xhat, dgate = sum dz_total * y.
struct NormModulateBackward {
  int64_t B, N, C, rows_per_block;
  ConstPtr dz;  // [B, N, C], last dimension dense; absent without y
  int64_t dz_stride_b, dz_stride_n;
  ConstPtr dn;  // [B, N, C] or absent
  int64_t dn_stride_b, dn_stride_n;
  ConstPtr z;  // [B, N, C], what was normalised; absent without dn
  int64_t z_stride_b, z_stride_n;
  ConstPtr y, gate, scale;  // as in the forward
  int64_t y_stride_b, y_stride_n, gate_stride_b, scale_stride_b;
  const float *mean, *rstd;  // [B, N]
  Ptr dx, dy;                // [B, N, C] dense; dx is absent without dn, dy without y
  float* partial;            // [B, ceil(N / rows_per_block), 3, C]: dshift, dscale, dgate
};
cudaError_t norm_modulate_backward(const NormModulateBackward& args, cudaStream_t stream);

// Enough blocks for a large GPU, few enough partial sums; depends on nothing but the shape, and so do the results.
constexpr int64_t norm_modulate_rows_per_block(int64_t B, int64_t N) {
  const int64_t rows = (B * N + 263) / 264;
  return rows < 4 ? 4 : rows > 64 ? 64 : rows;
}

// out[r][b, c] = sum over blocks of partial[b, block, r, c], in a fixed order.
struct PartialSums {
  int64_t B, blocks, C;
  const float* partial;  // [B, blocks, 3, C]
  Ptr out[3];            // [B, C] dense; each may be absent
};
cudaError_t sum_partials(const PartialSums& args, cudaStream_t stream);

}  // namespace sana_ext::cuda
