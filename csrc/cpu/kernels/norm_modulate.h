// Residual, gate, LayerNorm and modulation in one pass over a row; the formulas are
// sana_ext/reference/norm_modulate.py's. One pair of kernels serves norm_modulate (no y), gated_residual (no n) and
// residual_norm_modulate.
#pragma once
#include "../../common/dtype.h"
#include "isa.h"

namespace sana_ext::cpu {

// z = x + gate * y;  n = (z - mean) * rstd * (1 + scale) + shift.  Accumulators are fp64 if x is, else fp32.
struct NormModulateForward {
  int64_t B, N, C;
  double eps;
  ConstPtr x;  // [B, N, C], last dimension dense
  int64_t x_stride_b, x_stride_n;
  ConstPtr y;  // [B, N, C] or absent
  int64_t y_stride_b, y_stride_n;
  ConstPtr gate;  // [B, C] or absent (gate = 1)
  int64_t gate_stride_b;
  ConstPtr shift, scale;  // [B, C]; absent together with n
  int64_t shift_stride_b, scale_stride_b;
  Ptr z;              // [B, N, C] dense; absent without y
  Ptr n;              // [B, N, C] dense, or absent
  void *mean, *rstd;  // [B, N] accumulators; nullptr without n
};

// Rows [begin, end) of the B * N rows.
SANA_EXT_KERNEL(norm_modulate_forward, NormModulateForward)

constexpr int64_t kNormModulateBlock = 32;  // rows per partial sum of the backward

// dz_total = dz + dLN(dn);  dx = dz_total;  dy = gate * dz_total;  partial sums over kNormModulateBlock rows of
// dshift = sum dn, dscale = sum dn * xhat, dgate = sum dz_total * y.
struct NormModulateBackward {
  int64_t B, N, C;
  ConstPtr dz;  // [B, N, C] or absent
  int64_t dz_stride_b, dz_stride_n;
  ConstPtr dn;  // [B, N, C] or absent
  int64_t dn_stride_b, dn_stride_n;
  ConstPtr z;  // [B, N, C], what was normalised; absent without dn
  int64_t z_stride_b, z_stride_n;
  ConstPtr y, gate, scale;  // as in the forward
  int64_t y_stride_b, y_stride_n, gate_stride_b, scale_stride_b;
  const void *mean, *rstd;  // [B, N]
  Ptr dx, dy;               // [B, N, C] dense; each may be absent
  void* partial;            // [B, ceil(N / kNormModulateBlock), 3, C] accumulators: dshift, dscale, dgate
  bool fp64;                // accumulator type
};

// Blocks [begin, end) of the B * ceil(N / kNormModulateBlock) row blocks.
SANA_EXT_KERNEL(norm_modulate_backward, NormModulateBackward)

// out[b, r, c] = sum over blocks of partial[b, block, r, c], in order. Items are the B * R rows.
struct PartialSums {
  int64_t B, blocks, R, C;
  const void* partial;  // [B, blocks, R, C] accumulators
  Ptr out[3];           // R pointers to [B, C] dense; each may be absent
  bool fp64;
};
SANA_EXT_KERNEL(sum_partials, PartialSums)

}  // namespace sana_ext::cpu
