#include "kernels/linear_attention.h"

#include "glue.h"
#include "kernels/norm_modulate.h"

namespace sana_ext::cpu {
namespace {

constexpr int64_t kMaxChunks = 16;  // partial states per image: enough to share out, few enough to add up

using Rows = LinearAttentionRows<ConstPtr>;
using RowsOut = LinearAttentionRows<Ptr>;

// q, k, v and their gradients are three tensors [B, N, H, D], or the thirds of one tensor [B, N, 3C].
Rows rows(const Tensor& t, const char* name) { return {in(t, name), t.stride(0), t.stride(1), t.stride(2)}; }
RowsOut rows(Tensor& t) { return {out(t), t.stride(0), t.stride(1), t.stride(2)}; }

template <class Pointer>
LinearAttentionRows<Pointer> third(Pointer p, int64_t i, const Tensor& qkv, const LinearAttentionSize& s) {
  using Bytes = std::conditional_t<std::is_same_v<Pointer, Ptr>, char, const char>;
  p.data = static_cast<Bytes*>(p.data) + i * s.H * s.D * size_of(p.dtype);
  return {p, qkv.stride(0), qkv.stride(1), s.D};
}

LinearAttentionSize make_size(const Tensor& like, int64_t B, int64_t N, int64_t H, int64_t D) {
  check(N > 0 && H > 0 && D > 0, "there must be at least one token, head and channel");
  const auto round_up = [](int64_t value, int64_t to) { return (value + to - 1) / to * to; };
  const int64_t chunk = round_up((N + kMaxChunks - 1) / kMaxChunks, kLinearAttentionBlock);
  return {B, N, H, D, round_up(D, kLinearAttentionPad), chunk, is_fp64(like)};
}
LinearAttentionSize make_size(const Tensor& q) {
  check(q.dim() == 4, "q must have shape [B, N, H, D]");
  return make_size(q, q.size(0), q.size(1), q.size(2), q.size(3));
}
LinearAttentionSize make_size(const Tensor& qkv, int64_t heads) {
  check(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, "qkv must have shape [B, N, 3 * heads * D]");
  return make_size(qkv, qkv.size(0), qkv.size(1), heads, qkv.size(2) / (3 * heads));
}

int64_t chunks(const LinearAttentionSize& s) { return (s.N + s.chunk - 1) / s.chunk; }

// One call of the op: sizes, norms, and what the forward leaves for the backward. Absent tensors have no elements.
struct Problem {
  Tensor like;  // device and accumulator type
  LinearAttentionSize s;
  OptionalTensor weight_q, weight_k;
  double eps;
  Tensor state, rstd_q, rstd_k;  // [B, H, D+1, D], [B, N], [B, N]

  Problem(const Tensor& like_, const LinearAttentionSize& s_, const OptionalTensor& wq, const OptionalTensor& wk,
          double eps_)
      : like(like_),
        s(s_),
        weight_q(dense(wq)),
        weight_k(dense(wk)),
        eps(eps_),
        state(like_),
        rstd_q(like_),
        rstd_k(like_) {
    check_shape(weight_q, "weight_q", {s.H * s.D});
    check_shape(weight_k, "weight_k", {s.H * s.D});
    check_same_precision(like, weight_q, "weight_q");
    check_same_precision(like, weight_k, "weight_k");
  }

  // NEGLIGIBLE_EPS of sana_ext/ops/linear_attention.py
  bool has_rstd_q() const { return weight_q && (eps > 1e-12 || s.fp64); }

  void allocate() {
    state = accumulators({s.B, s.H, s.D + 1, s.D});
    rstd_q = has_rstd_q() ? accumulators({s.B, s.N}) : accumulators({0});
    rstd_k = weight_k ? accumulators({s.B, s.N}) : accumulators({0});
  }
  void take(const Tensor& state_, const Tensor& rstd_q_, const Tensor& rstd_k_) {
    check_shape(state_, "state", {s.B, s.H, s.D + 1, s.D});
    const auto statistics = [&](const Tensor& t, const char* name, bool wanted) {
      wanted ? check_shape(t, name, {s.B, s.N}) : check_shape(t, name, {0});
    };
    statistics(rstd_q_, "rstd_q", has_rstd_q());
    statistics(rstd_k_, "rstd_k", bool(weight_k));
    for (const Tensor* t : {&state_, &rstd_q_, &rstd_k_})
      check(t->scalar_type() == accumulator_of(like), "state, rstd_q and rstd_k must have the accumulator type");
    state = dense(state_);
    rstd_q = dense(rstd_q_);
    rstd_k = dense(rstd_k_);
  }

  Tensor accumulators(std::initializer_list<int64_t> shape) const { return empty(like, shape, accumulator_of(like)); }
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

void check_rows(const Tensor& q, const LinearAttentionSize& s, const Tensor& t, const char* name) {
  check_shape(t, name, {s.B, s.N, s.H, s.D});
  check_same_precision(q, t, name);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward_cpu(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                       const OptionalTensor& weight_q, const OptionalTensor& weight_k,
                                                       double norm_eps, double eps) {
  Problem p(q_in, make_size(q_in), weight_q, weight_k, eps);
  check_rows(q_in, p.s, k_in, "k");
  check_rows(q_in, p.s, v_in, "v");
  const Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  Tensor result = empty(q, {p.s.B, p.s.N, p.s.H, p.s.D}, q.scalar_type());
  forward(p, rows(q, "q"), rows(k, "k"), rows(v, "v"), norm_eps, result);
  return {result, p.state, p.rstd_q, p.rstd_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward_cpu(
    const Tensor& dout_in, const Tensor& q_in, const Tensor& k_in, const Tensor& v_in, const OptionalTensor& weight_q,
    const OptionalTensor& weight_k, const Tensor& state, const Tensor& rstd_q, const Tensor& rstd_k, double eps) {
  Problem p(q_in, make_size(q_in), weight_q, weight_k, eps);
  p.take(state, rstd_q, rstd_k);
  check_rows(q_in, p.s, dout_in, "dout");
  check_rows(q_in, p.s, k_in, "k");
  check_rows(q_in, p.s, v_in, "v");
  const Tensor dout = dense_rows(dout_in), q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
  const auto like = [&](const Tensor& t) { return empty(t, {p.s.B, p.s.N, p.s.H, p.s.D}, t.scalar_type()); };
  Tensor dq = like(q), dk = like(k), dv = like(v);
  const auto [dweight_q, dweight_k] =
      backward(p, rows(dout, "dout"), rows(q, "q"), rows(k, "k"), rows(v, "v"), {rows(dq), rows(dk), rows(dv)});
  return {dq, dk, dv, dweight_q, dweight_k};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> qkv_forward_cpu(const Tensor& qkv_in, int64_t heads,
                                                           const OptionalTensor& weight_q,
                                                           const OptionalTensor& weight_k, double norm_eps,
                                                           double eps) {
  Problem p(qkv_in, make_size(qkv_in, heads), weight_q, weight_k, eps);
  const Tensor qkv = dense_rows(qkv_in);
  const ConstPtr x = in(qkv, "qkv");
  Tensor result = empty(qkv, {p.s.B, p.s.N, p.s.H * p.s.D}, qkv.scalar_type());
  forward(p, third(x, 0, qkv, p.s), third(x, 1, qkv, p.s), third(x, 2, qkv, p.s), norm_eps, result);
  return {result, p.state, p.rstd_q, p.rstd_k};
}

std::tuple<Tensor, Tensor, Tensor> qkv_backward_cpu(const Tensor& dout_in, const Tensor& qkv_in,
                                                    const OptionalTensor& weight_q, const OptionalTensor& weight_k,
                                                    const Tensor& state, const Tensor& rstd_q, const Tensor& rstd_k,
                                                    double eps) {
  check(state.dim() == 4, "state must have shape [B, H, D+1, D]");
  Problem p(qkv_in, make_size(qkv_in, state.size(1)), weight_q, weight_k, eps);
  p.take(state, rstd_q, rstd_k);
  check_shape(dout_in, "dout", {p.s.B, p.s.N, p.s.H * p.s.D});
  check_same_precision(qkv_in, dout_in, "dout");
  const Tensor qkv = dense_rows(qkv_in), dout = dense_rows(dout_in);
  const ConstPtr x = in(qkv, "qkv");
  Tensor dqkv = empty(qkv, {p.s.B, p.s.N, 3 * p.s.H * p.s.D}, qkv.scalar_type());
  const Ptr d = out(dqkv);
  const Rows g{in(dout, "dout"), dout.stride(0), dout.stride(1), p.s.D};
  const auto [dweight_q, dweight_k] =
      backward(p, g, third(x, 0, qkv, p.s), third(x, 1, qkv, p.s), third(x, 2, qkv, p.s),
               {third(d, 0, dqkv, p.s), third(d, 1, dqkv, p.s), third(d, 2, dqkv, p.s)});
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
