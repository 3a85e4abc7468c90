#include "kernels/linear_attention.h"

#include "kernels/norm_modulate.h"
#include "linear_attention_arguments.h"

namespace sana_ext::cpu {
namespace {

constexpr int64_t kMaxChunks = 16;  // partial states per image: enough to share out, few enough to add up

using Rows = LinearAttentionRows<ConstPtr>;
using RowsOut = LinearAttentionRows<Ptr>;

LinearAttentionSize make_size(const LinearAttentionArguments& a) {
  const auto round_up = [](int64_t value, int64_t to) { return (value + to - 1) / to * to; };
  const int64_t chunk = round_up((a.N + kMaxChunks - 1) / kMaxChunks, kLinearAttentionBlock);
  return {a.B, a.N, a.H, a.D, round_up(a.D, kLinearAttentionPad), chunk, is_fp64(a.like)};
}

int64_t chunks(const LinearAttentionSize& s) { return (s.N + s.chunk - 1) / s.chunk; }

struct Problem : LinearAttentionArguments {
  LinearAttentionSize s;
  template <class... Parts>
  explicit Problem(const Parts&... parts) : LinearAttentionArguments(parts...), s(make_size(*this)) {}

  Tensor partial_states() const { return accumulators({s.B, chunks(s), s.H, s.D + 1, s.P}); }
  int64_t grain(int64_t tokens) const { return kGrainElements / (tokens * s.H * s.D); }
};

void* data(Tensor& t) { return t.numel() > 0 ? t.mutable_data_ptr() : nullptr; }
const void* const_data(const Tensor& t) { return t.numel() > 0 ? t.const_data_ptr() : nullptr; }

void sum_states(const Problem& p, int64_t parts, const Tensor& partial, int64_t width, void* state, void* padded,
                void* transposed) {
  const LinearAttentionSum a{p.s, parts, const_data(partial), width, state, padded, transposed};
  parallel(linear_attention_sum, a, p.s.B * p.s.H, kGrainElements / ((parts + 1) * (p.s.D + 1) * p.s.P));
}

void forward(Problem& p, const Rows& q, const Rows& k, const Rows& v, double norm_eps, Tensor& result) {
  const LinearAttentionSize& s = p.s;
  p.allocate();
  if (s.B == 0) return;
  Tensor partial = p.partial_states();
  const LinearAttentionState a{s, norm_eps, k, v, in(p.weight_k, "weight_k"), data(p.rstd_k), data(partial)};
  parallel(linear_attention_state, a, s.B * chunks(s), p.grain(s.chunk));
  Tensor padded = s.P == s.D ? p.state : p.accumulators({s.B, s.H, s.D + 1, s.P});
  sum_states(p, chunks(s), partial, s.P, data(p.state), s.P == s.D ? nullptr : data(padded), nullptr);
  const int64_t blocks = (s.N + kLinearAttentionBlock - 1) / kLinearAttentionBlock;
  const LinearAttentionOutput o{
      s, norm_eps, p.eps, q, in(p.weight_q, "weight_q"), data(padded), data(p.rstd_q), out(result)};
  parallel(linear_attention_output, o, s.B * blocks, p.grain(kLinearAttentionBlock));
}

struct Gradients {
  RowsOut dq, dk, dv;
};

// Adds up the partial gradients [B * chunks, C] of a weight.
Tensor sum_weight(const Problem& p, const OptionalTensor& weight, const Tensor& partial) {
  if (!weight) return p.accumulators({0});
  Tensor result = empty(p.like, {p.s.H * p.s.D}, weight->scalar_type());
  PartialSums a{};
  a.B = 1, a.blocks = p.s.B * chunks(p.s), a.R = 1, a.C = p.s.H * p.s.D, a.partial = const_data(partial),
  a.fp64 = p.s.fp64;
  a.out[0] = out(result);
  parallel(sum_partials, a, 1, 1);
  return result;
}

std::tuple<Tensor, Tensor> backward(const Problem& p, const Rows& dout, const Rows& q, const Rows& k, const Rows& v,
                                    const Gradients& d) {
  const LinearAttentionSize& s = p.s;
  const int64_t items = s.B * chunks(s), C = s.H * s.D;
  Tensor partial = p.partial_states(), padded = p.accumulators({s.B, s.H, s.D + 1, s.P}),
         transposed = p.accumulators({s.B, s.H, s.D, s.P});
  Tensor weight_q = p.accumulators({p.weight_q ? items : 0, C}), weight_k = p.accumulators({p.weight_k ? items : 0, C});
  sum_states(p, 1, p.state, s.D, nullptr, data(padded), data(transposed));
  const LinearAttentionBackwardQ a{s,
                                   p.eps,
                                   dout,
                                   q,
                                   in(p.weight_q, "weight_q"),
                                   const_data(p.rstd_q),
                                   data(padded),
                                   data(transposed),
                                   d.dq,
                                   data(partial),
                                   data(weight_q)};
  parallel(linear_attention_backward_q, a, items, p.grain(s.chunk));
  sum_states(p, chunks(s), partial, s.P, nullptr, data(padded), data(transposed));
  const LinearAttentionBackwardK c{s,
                                   k,
                                   v,
                                   in(p.weight_k, "weight_k"),
                                   const_data(p.rstd_k),
                                   data(padded),
                                   data(transposed),
                                   d.dk,
                                   d.dv,
                                   data(weight_k)};
  parallel(linear_attention_backward_k, c, items, p.grain(s.chunk));
  return {sum_weight(p, p.weight_q, weight_q), sum_weight(p, p.weight_k, weight_k)};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                       const OptionalTensor& weight_q, const OptionalTensor& weight_k,
                                                       double norm_eps, double eps) {
  Problem p(q_in, weight_q, weight_k, eps);
  p.check_rows(k_in, "k");
  p.check_rows(v_in, "v");
  const Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  Tensor result = empty(q, {p.s.B, p.s.N, p.s.H, p.s.D}, q.scalar_type());
  forward(p, rows(in(q, "q"), q), rows(in(k, "k"), k), rows(in(v, "v"), v), norm_eps, result);
  return {result, p.state, p.rstd_q, p.rstd_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& weight_q,
    const OptionalTensor& weight_k, const Tensor& state, const Tensor& rstd_q, const Tensor& rstd_k, double eps) {
  Problem p(q_in, weight_q, weight_k, eps);
  p.take(state, rstd_q, rstd_k);
  p.check_rows(dout_in, "dout");
  p.check_rows(k_in, "k");
  p.check_rows(v_in, "v");
  const Tensor dout = dense_rows(dout_in), q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const auto like = [&](const Tensor& t) { return empty(t, {p.s.B, p.s.N, p.s.H, p.s.D}, t.scalar_type()); };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const auto [dweight_q, dweight_k] =
      backward(p, rows(in(dout, "dout"), dout), rows(in(q, "q"), q), rows(in(k, "k"), k), rows(in(v, "v"), v),
               {rows(out(dq), dq), rows(out(dk), dk), rows(out(dv), dv)});
  return {dq, dk, dv, dweight_q, dweight_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qkv_forward_cpu(const Tensor& qkv_in, int64_t heads,
                                                           const OptionalTensor& weight_q,
                                                           const OptionalTensor& weight_k, double norm_eps,
                                                           double eps) {
  Problem p(qkv_in, heads, weight_q, weight_k, eps);
  const Tensor qkv = dense_rows(qkv_in);
  const ConstPtr x = in(qkv, "qkv");
  Tensor result = empty(qkv, {p.s.B, p.s.N, p.s.H * p.s.D}, qkv.scalar_type());
  forward(p, third(x, 0, qkv, p.D), third(x, 1, qkv, p.D), third(x, 2, qkv, p.D), norm_eps, result);
  return {result, p.state, p.rstd_q, p.rstd_k};
}

std::tuple<Tensor, Tensor, Tensor> qkv_backward_cpu(const Tensor& dout_in, const Tensor& qkv_in,
                                                    const OptionalTensor& weight_q, const OptionalTensor& weight_k,
                                                    const Tensor& state, const Tensor& rstd_q, const Tensor& rstd_k,
                                                    double eps) {
  check(state.dim() == 4, "state must have shape [B, H, D+1, D]");
  Problem p(qkv_in, state.size(1), weight_q, weight_k, eps);
  p.take(state, rstd_q, rstd_k);
  p.check_packed_rows(dout_in, "dout");
  const Tensor qkv = dense_rows(qkv_in), dout = dense_rows(dout_in);
  const ConstPtr x = in(qkv, "qkv");
  Tensor dqkv = empty(qkv, {p.s.B, p.s.N, 3 * p.s.H * p.s.D}, qkv.scalar_type());
  const Ptr d = out(dqkv);
  const Rows g{in(dout, "dout"), dout.stride(0), dout.stride(1), p.s.D};
  const auto [dweight_q, dweight_k] =
      backward(p, g, third(x, 0, qkv, p.D), third(x, 1, qkv, p.D), third(x, 2, qkv, p.D),
               {third(d, 0, dqkv, p.D), third(d, 1, dqkv, p.D), third(d, 2, dqkv, p.D)});
  return {dqkv, dweight_q, dweight_k};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&forward_cpu));
  m.impl("linear_attention_backward", TORCH_BOX(&backward_cpu));
  m.impl("linear_attention_qkv_forward", TORCH_BOX(&qkv_forward_cpu));
  m.impl("linear_attention_qkv_backward", TORCH_BOX(&qkv_backward_cpu));
}

}  // namespace sana_ext::cpu
