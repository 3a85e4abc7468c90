// CUDA glue of linear_attention and its packed form.
#include "kernels/linear_attention.h"

#include "../cpu/linear_attention_arguments.h"
#include "glue.h"

namespace sana_ext::cuda {
namespace {

using cpu::dense;
using cpu::rows;
using cpu::third;
using Rows = LinearAttentionRows<ConstPtr>;
using RowsOut = LinearAttentionRows<Ptr>;

// One call of the op: its sizes and checks, its launches, and the pointers that both directions pass on.
struct Call : cpu::LinearAttentionArguments {
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
  Rows in(const Tensor& t, const char* name) { return rows(launch.in(t, name), t); }
  RowsOut out(Tensor& t, const char* name) { return rows(launch.out(t, name), t); }
  void succeeded(cudaError_t error) const { Launch::succeeded(error, "linear_attention"); }

  void sum(int64_t parts, int64_t count, const float* from, float* to) {
    succeeded(sum_parts({B, parts, count, from, to}, launch.stream()));
  }
};

void forward(Call& c, const Rows& q, const Rows& k, const Rows& v, double norm_eps, const RowsOut& result) {
  c.allocate();
  const float* const rstd_k = c.weight_k ? c.launch.out_fp32(c.rstd_k, "rstd_k") : nullptr;
  const float* const rstd_q = c.has_rstd_q() ? c.launch.out_fp32(c.rstd_q, "rstd_q") : nullptr;
  float* const state = c.launch.out_fp32(c.state, "state");
  const auto statistics = [&](const Rows& x, const float* rstd) {
    const RowRstd a{c.size, static_cast<float>(norm_eps), x, const_cast<float*>(rstd)};
    if (rstd != nullptr) c.succeeded(row_rstd(a, c.launch.stream()));
  };
  statistics(k, rstd_k);
  statistics(q, rstd_q);
  const int64_t parts = c.size.parts();
  Tensor partial = c.accumulators({parts > 1 ? c.B : 0, parts, c.state_size()});
  float* const sums = parts > 1 ? c.launch.out_fp32(partial, "partial") : state;
  c.succeeded(linear_attention_state({c.size, k, v, c.for_k, rstd_k, sums}, c.launch.stream()));
  if (parts > 1) c.sum(parts, c.state_size(), sums, state);
  c.succeeded(
      linear_attention_output({c.size, c.denominator_eps(), q, c.for_q, rstd_q, state, result}, c.launch.stream()));
}

struct Gradients {
  RowsOut dq, dk, dv;
};

std::tuple<Tensor, Tensor> backward(Call& c, const Rows& dout, const Rows& q, const Rows& k, const Rows& v,
                                    const Gradients& d) {
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

  LinearAttentionBackwardQ a{c.size, c.denominator_eps(), dout, q,    c.for_q, rstd_q,
                             state,  sum_of_heads,        d.dq, sums, nullptr};
  Tensor work = c.accumulators({is_tuned(a) ? 0 : 2, c.B, c.H, c.N});
  a.work = c.launch.out_fp32(work, "work");
  if (rstd_q != nullptr) {
    c.succeeded(linear_attention_backward_q_rows(a, heads, c.launch.stream()));
    c.sum(c.H, c.N, heads, sum_of_heads);
  }
  c.succeeded(linear_attention_backward_q(a, c.launch.stream()));
  if (parts > 1) c.sum(parts, c.state_size(), sums, dstates);

  const LinearAttentionBackwardK b{c.size, k, v, c.for_k, rstd_k, dstates, sum_of_heads, d.dk, d.dv};
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

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cuda(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                        const OptionalTensor& weight_q, const OptionalTensor& weight_k,
                                                        double norm_eps, double eps) {
  Call c(q_in, weight_q, weight_k, eps);
  c.check_rows(k_in, "k");
  c.check_rows(v_in, "v");
  const Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  Tensor result = empty(q, {c.B, c.N, c.H, c.D}, q.scalar_type());
  forward(c, c.in(q, "q"), c.in(k, "k"), c.in(v, "v"), norm_eps, c.out(result, "out"));
  return {result, c.state, c.rstd_q, c.rstd_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_cuda(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& weight_q,
    const OptionalTensor& weight_k, const Tensor& state, const Tensor& rstd_q, const Tensor& rstd_k, double eps) {
  Call c(q_in, weight_q, weight_k, eps);
  c.take(state, rstd_q, rstd_k);
  c.check_rows(dout_in, "dout");
  c.check_rows(k_in, "k");
  c.check_rows(v_in, "v");
  const Tensor dout = dense_rows(dout_in), q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const auto like = [&](const Tensor& t) { return empty(t, {c.B, c.N, c.H, c.D}, t.scalar_type()); };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const auto [dweight_q, dweight_k] = backward(c, c.in(dout, "dout"), c.in(q, "q"), c.in(k, "k"), c.in(v, "v"),
                                               {c.out(dq, "dq"), c.out(dk, "dk"), c.out(dv, "dv")});
  return {dq, dk, dv, dweight_q, dweight_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qkv_forward_cuda(const Tensor& qkv_in, int64_t heads,
                                                            const OptionalTensor& weight_q,
                                                            const OptionalTensor& weight_k, double norm_eps,
                                                            double eps) {
  Call c(qkv_in, heads, weight_q, weight_k, eps);
  const Tensor qkv = dense_rows(qkv_in);
  const ConstPtr x = c.launch.in(qkv, "qkv");
  Tensor result = empty(qkv, {c.B, c.N, c.H * c.D}, qkv.scalar_type());
  const RowsOut out{c.launch.out(result, "out"), result.stride(0), result.stride(1), c.D};
  forward(c, third(x, 0, qkv, c.D), third(x, 1, qkv, c.D), third(x, 2, qkv, c.D), norm_eps, out);
  return {result, c.state, c.rstd_q, c.rstd_k};
}

std::tuple<Tensor, Tensor, Tensor> qkv_backward_cuda(const Tensor& dout_in, const Tensor& qkv_in,
                                                     const OptionalTensor& weight_q, const OptionalTensor& weight_k,
                                                     const Tensor& state, const Tensor& rstd_q, const Tensor& rstd_k,
                                                     double eps) {
  check(state.dim() == 4, "state must have shape [B, H, D+1, D]");
  Call c(qkv_in, state.size(1), weight_q, weight_k, eps);
  c.take(state, rstd_q, rstd_k);
  c.check_packed_rows(dout_in, "dout");
  const Tensor qkv = dense_rows(qkv_in), dout = dense_rows(dout_in);
  const ConstPtr x = c.launch.in(qkv, "qkv");
  Tensor dqkv = empty(qkv, {c.B, c.N, 3 * c.H * c.D}, qkv.scalar_type());
  const Ptr d = c.launch.out(dqkv, "dqkv");
  const Rows g{c.launch.in(dout, "dout"), dout.stride(0), dout.stride(1), c.D};
  const auto [dweight_q, dweight_k] =
      backward(c, g, third(x, 0, qkv, c.D), third(x, 1, qkv, c.D), third(x, 2, qkv, c.D),
               {third(d, 0, dqkv, c.D), third(d, 1, dqkv, c.D), third(d, 2, dqkv, c.D)});
  return {dqkv, dweight_q, dweight_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, SANA_EXT_DEVICE, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward_cuda));
  m.impl("linear_attention_backward", TORCH_BOX(&backward_cuda));
  m.impl("linear_attention_qkv_forward", TORCH_BOX(&qkv_forward_cuda));
  m.impl("linear_attention_qkv_backward", TORCH_BOX(&qkv_backward_cuda));
}

}  // namespace sana_ext::cuda
