// CUDA glue of linear_attention and its packed form.
#include "kernels/linear_attention.h"

#include "../glue/linear_attention.h"
#include "glue.h"

namespace sana_ext::cuda {
namespace {

using Inputs = glue::LinearAttentionInputs;
using Gradients = glue::LinearAttentionGradients;
using Rows = LinearAttentionRows<ConstPtr>;
using RowsOut = LinearAttentionRows<Ptr>;

// One call of the op: its sizes and checks, its launches, and the pointers that both directions pass on.
struct Call : glue::LinearAttentionArguments {
  Launch launch;
  LinearAttentionSize size;
  ConstPtr for_q, for_k;  // the weights

  template <class... Parts>
  explicit Call(const Tensor& first, const Parts&... parts)
      : LinearAttentionArguments(first, parts...),
        launch(first),
        size{B, N, H, D, linear_attention_tokens(B, N, H)},
        for_q(launch.in(weight_q, "weight_q")),
        for_k(launch.in(weight_k, "weight_k")) {}

  // What the denominator gains: eps / rstd_q, eps without a norm, and nothing where the row scale of q cancels.
  float denominator_eps() const { return weight_q && !has_rstd_q() ? 0.0f : static_cast<float>(eps); }
  int64_t state_size() const { return H * (D + 1) * D; }
  ConstPtr in(const Tensor& t, const char* name) { return launch.in(t, name); }
  Ptr out(Tensor& t, const char* name) { return launch.out(t, name); }
  void succeeded(cudaError_t error) const { Launch::succeeded(error, "linear_attention"); }

  void sum(int64_t parts, int64_t count, const float* from, float* to) {
    succeeded(sum_parts({B, parts, count, from, to}, launch.stream()));
  }
};

void run_forward(Call& c, const Inputs& x, double norm_eps, const RowsOut& result) {
  c.allocate();
  const float* const rstd_k = c.weight_k ? c.launch.out_fp32(c.rstd_k, "rstd_k") : nullptr;
  const float* const rstd_q = c.has_rstd_q() ? c.launch.out_fp32(c.rstd_q, "rstd_q") : nullptr;
  float* const state = c.launch.out_fp32(c.state, "state");
  const auto statistics = [&](const Rows& rows, const float* rstd) {
    const RowRstd a{c.size, static_cast<float>(norm_eps), rows, const_cast<float*>(rstd)};
    if (rstd != nullptr) c.succeeded(row_rstd(a, c.launch.stream()));
  };
  statistics(x.k, rstd_k);
  statistics(x.q, rstd_q);
  const int64_t parts = c.size.parts();
  Tensor partial = c.accumulators({parts > 1 ? c.B : 0, parts, c.state_size()});
  float* const sums = parts > 1 ? c.launch.out_fp32(partial, "partial") : state;
  c.succeeded(linear_attention_state({c.size, x.k, x.v, c.for_k, rstd_k, sums}, c.launch.stream()));
  if (parts > 1) c.sum(parts, c.state_size(), sums, state);
  c.succeeded(
      linear_attention_output({c.size, c.denominator_eps(), x.q, c.for_q, rstd_q, state, result}, c.launch.stream()));
}

std::tuple<Tensor, Tensor> run_backward(Call& c, const Rows& dout, const Inputs& x, const Gradients& d) {
  const int64_t parts = c.size.parts();
  const float* const rstd_k = c.weight_k ? c.launch.in_fp32(c.rstd_k, "rstd_k") : nullptr;
  const float* const rstd_q = c.has_rstd_q() ? c.launch.in_fp32(c.rstd_q, "rstd_q") : nullptr;
  const float* const state = c.launch.in_fp32(c.state, "state");
  const bool row_sums = rstd_k != nullptr || rstd_q != nullptr;
  Tensor dstate = c.accumulators({c.B, c.state_size()});
  Tensor partial = c.accumulators({parts > 1 ? c.B : 0, parts, c.state_size()});
  Tensor per_head = c.accumulators({row_sums ? c.B : 0, c.H, c.N}), per_row = c.accumulators({row_sums ? c.B : 0, c.N});
  float* const dstates = c.launch.out_fp32(dstate, "dstate");
  float* const sums = parts > 1 ? c.launch.out_fp32(partial, "partial") : dstates;
  float* const heads = c.launch.out_fp32(per_head, "per_head");
  float* const sum_of_heads = c.launch.out_fp32(per_row, "per_row");

  LinearAttentionBackwardQ a{c.size, c.denominator_eps(), dout, x.q,  c.for_q, rstd_q,
                             state,  sum_of_heads,        d.dq, sums, nullptr};
  Tensor work = c.accumulators({is_tuned(a) ? 0 : 2, c.B, c.H, c.N});
  a.work = c.launch.out_fp32(work, "work");
  if (rstd_q != nullptr) {
    c.succeeded(linear_attention_backward_q_rows(a, heads, c.launch.stream()));
    c.sum(c.H, c.N, heads, sum_of_heads);
  }
  c.succeeded(linear_attention_backward_q(a, c.launch.stream()));
  if (parts > 1) c.sum(parts, c.state_size(), sums, dstates);

  const LinearAttentionBackwardK b{c.size, x.k, x.v, c.for_k, rstd_k, dstates, sum_of_heads, d.dk, d.dv};
  if (rstd_k != nullptr) {
    c.succeeded(linear_attention_backward_k_rows(b, heads, c.launch.stream()));
    c.sum(c.H, c.N, heads, sum_of_heads);
  }
  c.succeeded(linear_attention_backward_k(b, c.launch.stream()));

  const auto gradient = [&](const OptionalTensor& weight) {
    return weight ? empty(c.like, {c.H * c.D}, weight->scalar_type()) : c.accumulators({0});
  };
  Tensor dweight_q = gradient(c.weight_q), dweight_k = gradient(c.weight_k);
  const WeightGradients w{c.size,
                          state,
                          dstates,
                          c.for_q,
                          c.for_k,
                          c.weight_q ? c.launch.out(dweight_q, "dweight_q") : Ptr{},
                          c.weight_k ? c.launch.out(dweight_k, "dweight_k") : Ptr{}};
  if (c.weight_q || c.weight_k) c.succeeded(weight_gradients(w, c.launch.stream()));
  return {dweight_q, dweight_k};
}

using Ops = glue::LinearAttentionOps<Call>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, SANA_EXT_DEVICE, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&Ops::forward));
  m.impl("linear_attention_backward", TORCH_BOX(&Ops::backward));
  m.impl("linear_attention_qkv_forward", TORCH_BOX(&Ops::qkv_forward));
  m.impl("linear_attention_qkv_backward", TORCH_BOX(&Ops::qkv_backward));
}

}  // namespace sana_ext::cuda
