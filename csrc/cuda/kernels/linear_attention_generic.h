// The paths of linear_attention for any head dimension, dtype and stride; each has the contract of its namesake in
// linear_attention.h.
#pragma once
#include "linear_attention.h"

namespace sana_ext::cuda {

cudaError_t linear_attention_state_generic(const LinearAttentionState& args, cudaStream_t stream);
cudaError_t linear_attention_output_generic(const LinearAttentionOutput& args, cudaStream_t stream);
cudaError_t linear_attention_backward_q_generic(const LinearAttentionBackwardQ& args, cudaStream_t stream);
cudaError_t linear_attention_backward_q_rows_generic(const LinearAttentionBackwardQ& args, float* b,
                                                     cudaStream_t stream);
cudaError_t linear_attention_backward_k_generic(const LinearAttentionBackwardK& args, cudaStream_t stream);
cudaError_t linear_attention_backward_k_rows_generic(const LinearAttentionBackwardK& args, float* c,
                                                     cudaStream_t stream);

}  // namespace sana_ext::cuda
