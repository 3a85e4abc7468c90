// ReLU linear attention with optional RMSNorms; the formulas are sana_ext/reference/linear_attention.py's.
//
// A head's state is a matrix of D + 1 rows: S = sum khat v^T, then z = sum khat. Kernels hold it with rows of P = D
// rounded up to kLinearAttentionPad elements (the padding is 0), so that every inner loop runs over whole vectors.
// Tokens are cut into chunks, which depend on sizes only; each chunk sums its own states, and linear_attention_sum adds
// them up in order. An accumulator (A in the comments) is fp64 if the rows are, else fp32.
#pragma once
#include "../../common/rows.h"
#include "isa.h"

namespace sana_ext::cpu {

constexpr int64_t kLinearAttentionPad = 16;    // a multiple of every level's vector
constexpr int64_t kLinearAttentionBlock = 16;  // tokens of one head held in the L1 cache

struct LinearAttentionSize {
  int64_t B, N, H, D;
  int64_t P;      // D rounded up
  int64_t chunk;  // tokens of one partial sum, a multiple of kLinearAttentionBlock
  bool fp64;      // accumulator type
};

// partial = state of each chunk; rstd_k = 1 / sqrt(mean(k^2) + norm_eps).
struct LinearAttentionState {
  LinearAttentionSize size;
  double norm_eps;
  LinearAttentionRows<ConstPtr> k, v;  // [B, N, H, D]
  ConstPtr weight_k;                   // [H * D] or absent (no norm)
  void* rstd_k;                        // [B, N] A; nullptr without weight_k
  void* partial;                       // [B, chunks, H, D + 1, P] A
};
// Chunks [begin, end) of the B * chunks.
SANA_EXT_KERNEL(linear_attention_state, LinearAttentionState)

// Sums `chunks` states in order. Each result may be absent.
struct LinearAttentionSum {
  LinearAttentionSize size;
  int64_t chunks;
  const void* partial;  // [B, chunks, H, D + 1, width] A
  int64_t width;        // D or P
  void* state;          // [B, H, D + 1, D] A
  void* padded;         // [B, H, D + 1, P] A
  void* transposed;     // [B, H, D, P] A: S^T
};
// Heads [begin, end) of the B * H.
SANA_EXT_KERNEL(linear_attention_sum, LinearAttentionSum)

// What the query side adds to the denominator: eps without weight_q; eps / rstd_q if rstd_q is there; else nothing.
struct LinearAttentionOutput {
  LinearAttentionSize size;
  double norm_eps, eps;
  LinearAttentionRows<ConstPtr> q;  // [B, N, H, D]
  ConstPtr weight_q;                // [H * D] or absent
  const void* padded;               // [B, H, D + 1, P] A, the state
  void* rstd_q;                     // [B, N] A, written; or nullptr
  Ptr out;                          // [B, N, H, D] dense
};
// Blocks [begin, end) of the B * ceil(N / kLinearAttentionBlock).
SANA_EXT_KERNEL(linear_attention_output, LinearAttentionOutput)

// dq, and per chunk the partial sums of the state's gradient (dS, then dz) and of weight_q's.
struct LinearAttentionBackwardQ {
  LinearAttentionSize size;
  double eps;
  LinearAttentionRows<ConstPtr> dout, q;  // [B, N, H, D]
  ConstPtr weight_q;                      // [H * D] or absent
  const void* rstd_q;                     // [B, N] A or nullptr
  const void* padded;                     // [B, H, D + 1, P] A, the state
  const void* transposed;                 // [B, H, D, P] A, S^T
  LinearAttentionRows<Ptr> dq;            // [B, N, H, D]
  void* partial;                          // [B, chunks, H, D + 1, P] A
  void* partial_weight;                   // [B, chunks, H * D] A; nullptr without weight_q
};
// Chunks [begin, end) of the B * chunks.
SANA_EXT_KERNEL(linear_attention_backward_q, LinearAttentionBackwardQ)

// dk, dv, and per chunk the partial sums of weight_k's gradient.
struct LinearAttentionBackwardK {
  LinearAttentionSize size;
  LinearAttentionRows<ConstPtr> k, v;  // [B, N, H, D]
  ConstPtr weight_k;                   // [H * D] or absent
  const void* rstd_k;                  // [B, N] A; nullptr without weight_k
  const void* padded;                  // [B, H, D + 1, P] A, the state's gradient
  const void* transposed;              // [B, H, D, P] A, dS^T
  LinearAttentionRows<Ptr> dk, dv;     // [B, N, H, D]
  void* partial_weight;                // [B, chunks, H * D] A; nullptr without weight_k
};
// Chunks [begin, end) of the B * chunks.
SANA_EXT_KERNEL(linear_attention_backward_k, LinearAttentionBackwardK)

}  // namespace sana_ext::cpu
