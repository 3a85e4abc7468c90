// ReLU linear attention with optional RMSNorms on the GPU; the formulas are sana_ext/reference/linear_attention.py's.
// Everything that is summed or divided is fp32. A weight w of a norm multiplies a channel, and relu(w x) = |w|
// relu(+-x): the kernels flip signs of 16-bit rows, which is exact, and scale rows of the state by |w|.
//
// Forward:  row_rstd(k) [with weight_k], state, sum_parts [if the tokens are cut], output.
// Backward: q_rows, sum_parts [with rstd_q]; q, sum_parts; k_rows, sum_parts [with rstd_k]; k; weights.
//
// Bytes from memory in bf16, in units of one [B, N, H * D] tensor: forward 4 (5 with weight_k), backward 7 (9 with
// weight_k). Predicted from them at 4.3 TB/s, nothing measured: forward 8.5 us at 2 x 1024 tokens of 70 heads and 137
// us at 32 x 1024 (10.7 and 171 with weight_k), backward 15 and 240 us (19 and 307).
#pragma once
#include "../../common/rows.h"
#include "runtime.h"

namespace sana_ext::cuda {

// Register budget, checked by `make kernels`: row_rstd_kernel 40, sum_parts_kernel 40, weight_gradients_kernel 48
// Register budget, checked by `make kernels`: linear_attention_state_kernel 96, linear_attention_output_kernel 96
// Register budget, checked by `make kernels`: linear_attention_backward_q_kernel 184
// Register budget, checked by `make kernels`: linear_attention_backward_k_kernel 184
// Register budget, checked by `make kernels`: outer_products_generic_kernel 80, output_generic_kernel 64
// Register budget, checked by `make kernels`: rows_generic_kernel 64
// Register budget, checked by `make kernels`: backward_q_generic_kernel 64, backward_k_generic_kernel 64
// Machine code, checked by `make kernels`: linear_attention_*_kernel<*>: HMMA LDSM LDGSTS.128
// Machine code, checked by `make kernels`: linear_attention_output_kernel<*>: STG.128; row_rstd_kernel<true>: LDG.128
// Machine code, checked by `make kernels`: linear_attention_backward_*_kernel<*, false>: STG.128

// A pass is tuned for heads of this many channels, all its rows of one 16-bit dtype and multiples of 16 bytes apart.
constexpr int64_t kLinearAttentionTunedDim = 32;

struct LinearAttentionSize {
  int64_t B, N, H, D;
  int64_t tokens;  // of one image that one partial sum covers
  SANA_EXT_ON_BOTH int64_t parts() const { return (N + tokens - 1) / tokens; }
};

// Enough warps for a large GPU, few enough partial sums; depends on nothing but the shape, and so do the results.
constexpr int64_t linear_attention_tokens(int64_t B, int64_t N, int64_t H) {
  const int64_t enough = (B * H * N + 4223) / 4224;  // 16 warps on each of 132 multiprocessors, twice
  const int64_t wanted = (enough < 128 ? 128 : enough), parts = (N + wanted - 1) / wanted;
  return ((N + parts - 1) / parts + 15) / 16 * 16;
}

// rstd = 1 / sqrt(mean over H and D of x^2 + norm_eps).
struct RowRstd {
  LinearAttentionSize size;
  float norm_eps;
  LinearAttentionRows<ConstPtr> x;  // [B, N, H, D]
  float* rstd;                      // [B, N]
};
cudaError_t row_rstd(const RowRstd& args, cudaStream_t stream);

// out[b, i] = sum over p of parts[b, p, i], in a fixed order: of states, and over heads.
struct PartSums {
  int64_t B, parts, count;
  const float* from;  // [B, parts, count]
  float* out;         // [B, count]
};
cudaError_t sum_parts(const PartSums& args, cudaStream_t stream);

// S = sum khat v^T and, as row D, z = sum khat; over each part of the tokens.
struct LinearAttentionState {
  LinearAttentionSize size;
  LinearAttentionRows<ConstPtr> k, v;  // [B, N, H, D]
  ConstPtr weight_k;                   // [H * D] or absent (no norm)
  const float* rstd_k;                 // [B, N]; nullptr without weight_k
  float* partial;                      // [B, parts, H, D + 1, D]
};
cudaError_t linear_attention_state(const LinearAttentionState& args, cudaStream_t stream);

// out = S^T u / (u . z + e) with u = relu(weight_q q); e = eps / rstd_q where rstd_q is given, else eps.
struct LinearAttentionOutput {
  LinearAttentionSize size;
  float eps;
  LinearAttentionRows<ConstPtr> q;  // [B, N, H, D]
  ConstPtr weight_q;                // [H * D] or absent
  const float* rstd_q;              // [B, N] or nullptr
  const float* state;               // [B, H, D + 1, D]
  LinearAttentionRows<Ptr> out;     // [B, N, H, D]
};
cudaError_t linear_attention_output(const LinearAttentionOutput& args, cudaStream_t stream);

// dq, and of each part of the tokens the sum of the state's gradient: dS, and dz as row D.
struct LinearAttentionBackwardQ {
  LinearAttentionSize size;
  float eps;
  LinearAttentionRows<ConstPtr> dout, q;  // [B, N, H, D]
  ConstPtr weight_q;                      // [H * D] or absent
  const float* rstd_q;                    // [B, N] or nullptr
  const float* state;                     // [B, H, D + 1, D]
  const float* row_sums;                  // [B, N], b summed over the heads; read with rstd_q
  LinearAttentionRows<Ptr> dq;            // [B, N, H, D]
  float* partial;                         // [B, parts, H, D + 1, D]
  float* work;                            // [2, B, H, N] for the generic kernels; nullptr where the tuned one runs
};
cudaError_t linear_attention_backward_q(const LinearAttentionBackwardQ& args, cudaStream_t stream);
// Only b = d(loss) / d(denominator) of each head: [B, H, N]. Its sum over the heads belongs to rstd_q.
cudaError_t linear_attention_backward_q_rows(const LinearAttentionBackwardQ& args, float* b, cudaStream_t stream);
bool is_tuned(const LinearAttentionBackwardQ& args);

// dk and dv from the state's gradient.
struct LinearAttentionBackwardK {
  LinearAttentionSize size;
  LinearAttentionRows<ConstPtr> k, v;  // [B, N, H, D]
  ConstPtr weight_k;                   // [H * D] or absent
  const float* rstd_k;                 // [B, N]; nullptr without weight_k
  const float* dstate;                 // [B, H, D + 1, D]
  const float* row_sums;               // [B, N], sum over all channels of weight_k dkhat k; read with rstd_k
  LinearAttentionRows<Ptr> dk, dv;     // [B, N, H, D]
};
cudaError_t linear_attention_backward_k(const LinearAttentionBackwardK& args, cudaStream_t stream);
// Only each head's share of row_sums: [B, H, N].
cudaError_t linear_attention_backward_k_rows(const LinearAttentionBackwardK& args, float* c, cudaStream_t stream);

// The gradients of both weights, from the states alone: a channel of q and the same channel of k enter the output only
// as the product of their scales, so weight_q dweight_q = weight_k dweight_k = sum_b (sum_j S_ij dS_ij + z_i dz_i).
struct WeightGradients {
  LinearAttentionSize size;
  const float *state, *dstate;  // [B, H, D + 1, D]
  ConstPtr weight_q, weight_k;  // [H * D]; each may be absent, its gradient with it
  Ptr dweight_q, dweight_k;     // [H * D]
};
cudaError_t weight_gradients(const WeightGradients& args, cudaStream_t stream);

}  // namespace sana_ext::cuda
