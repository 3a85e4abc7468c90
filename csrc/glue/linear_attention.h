// One call of linear_attention as both glues see it: sizes, checks, what the forward leaves for the backward, and the
// four entry points.
#pragma once
#include "../common/rows.h"
#include "tensors.h"

namespace sana_ext::glue {

// q, k, v and their gradients are three tensors [B, N, H, D], or the thirds of one tensor [B, N, 3C].
template <class Pointer>
LinearAttentionRows<Pointer> rows(Pointer p, const Tensor& t) {
  return {p, t.stride(0), t.stride(1), t.stride(2)};
}
template <class Pointer>
LinearAttentionRows<Pointer> third(Pointer p, int64_t i, const Tensor& qkv, int64_t D) {
  using Bytes = std::conditional_t<std::is_same_v<Pointer, Ptr>, char, const char>;
  p.data = static_cast<Bytes*>(p.data) + i * (qkv.size(2) / 3) * size_of(p.dtype);
  return {p, qkv.stride(0), qkv.stride(1), D};
}

struct LinearAttentionArguments {
  Tensor like;  // device and accumulator type
  int64_t B, N, H, D;
  OptionalTensor weight_q, weight_k;  // [H * D]
  double eps;
  Tensor state, rstd_q, rstd_k;  // [B, H, D+1, D], [B, N], [B, N]; absent ones have no elements

  // Of q, or of the packed tensor and its number of heads.
  LinearAttentionArguments(const Tensor& q, const OptionalTensor& wq, const OptionalTensor& wk, double eps_)
      : LinearAttentionArguments(q, sizes(q), wq, wk, eps_) {}
  LinearAttentionArguments(const Tensor& qkv, int64_t heads, const OptionalTensor& wq, const OptionalTensor& wk,
                           double eps_)
      : LinearAttentionArguments(qkv, sizes(qkv, heads), wq, wk, eps_) {}

  // NEGLIGIBLE_EPS of sana_ext/ops/linear_attention.py
  bool has_rstd_q() const { return weight_q && (eps > 1e-12 || is_fp64(like)); }

  void allocate() {
    state = accumulators({B, H, D + 1, D});
    rstd_q = has_rstd_q() ? accumulators({B, N}) : accumulators({0});
    rstd_k = weight_k ? accumulators({B, N}) : accumulators({0});
  }
  void take(const Tensor& state_, const Tensor& rstd_q_, const Tensor& rstd_k_) {
    check_shape(state_, "state", {B, H, D + 1, D});
    const auto statistics = [&](const Tensor& t, const char* name, bool wanted) {
      wanted ? check_shape(t, name, {B, N}) : check_shape(t, name, {0});
    };
    statistics(rstd_q_, "rstd_q", has_rstd_q());
    statistics(rstd_k_, "rstd_k", bool(weight_k));
    for (const Tensor* t : {&state_, &rstd_q_, &rstd_k_})
      check(t->scalar_type() == accumulator_of(like), "state, rstd_q and rstd_k must have the accumulator type");
    state = dense(state_);
    rstd_q = dense(rstd_q_);
    rstd_k = dense(rstd_k_);
  }
  void check_rows(const Tensor& t, const char* name) const {
    check_shape(t, name, {B, N, H, D});
    check_same_precision(like, t, name);
  }
  void check_packed_rows(const Tensor& t, const char* name) const {
    check_shape(t, name, {B, N, H * D});
    check_same_precision(like, t, name);
  }

  Tensor accumulators(std::initializer_list<int64_t> shape) const { return empty(like, shape, accumulator_of(like)); }

 private:
  struct Sizes {
    int64_t B, N, H, D;
  };
  LinearAttentionArguments(const Tensor& like_, const Sizes& s, const OptionalTensor& wq, const OptionalTensor& wk,
                           double eps_)
      : like(like_),
        B(s.B),
        N(s.N),
        H(s.H),
        D(s.D),
        weight_q(dense(wq)),
        weight_k(dense(wk)),
        eps(eps_),
        state(like_),
        rstd_q(like_),
        rstd_k(like_) {
    check(N > 0 && H > 0 && D > 0, "there must be at least one token, head and channel");
    check_shape(weight_q, "weight_q", {H * D});
    check_shape(weight_k, "weight_k", {H * D});
    check_same_precision(like, weight_q, "weight_q");
    check_same_precision(like, weight_k, "weight_k");
  }
  static Sizes sizes(const Tensor& q) {
    check(q.dim() == 4, "q must have shape [B, N, H, D]");
    return {q.size(0), q.size(1), q.size(2), q.size(3)};
  }
  static Sizes sizes(const Tensor& qkv, int64_t heads) {
    check(qkv.dim() == 3 && heads > 0 && qkv.size(2) % (3 * heads) == 0, "qkv must have shape [B, N, 3 * heads * D]");
    return {qkv.size(0), qkv.size(1), heads, qkv.size(2) / (3 * heads)};
  }
};

// Rows of three tensors or of one packed tensor, and of their gradients.
struct LinearAttentionInputs {
  LinearAttentionRows<ConstPtr> q, k, v;
};
struct LinearAttentionGradients {
  LinearAttentionRows<Ptr> dq, dk, dv;
};

// What the dispatcher calls. A device's Call is a LinearAttentionArguments that turns tensors into pointers (in, out);
// beside it stand run_forward(call, inputs, norm_eps, out) and run_backward(call, dout, inputs, gradients), which
// returns the gradients of the weights.
template <class Call>
struct LinearAttentionOps {
  static std::tuple<Tensor, Tensor, Tensor, Tensor> forward(const Tensor& q_in, const Tensor& k_in, const Tensor& v_in,
                                                            const OptionalTensor& weight_q,
                                                            const OptionalTensor& weight_k, double norm_eps,
                                                            double eps) {
    Call c(q_in, weight_q, weight_k, eps);
    c.check_rows(k_in, "k");
    c.check_rows(v_in, "v");
    const Tensor q = dense_rows(q_in), k = dense_rows(k_in), v = dense_rows(v_in);
    Tensor result = empty(q, {c.B, c.N, c.H, c.D}, q.scalar_type());
    run_forward(c, {rows(c.in(q, "q"), q), rows(c.in(k, "k"), k), rows(c.in(v, "v"), v)}, norm_eps,
                rows(c.out(result, "out"), result));
    return {result, c.state, c.rstd_q, c.rstd_k};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> backward(
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
    const auto [dweight_q, dweight_k] = run_backward(
        c, rows(c.in(dout, "dout"), dout), {rows(c.in(q, "q"), q), rows(c.in(k, "k"), k), rows(c.in(v, "v"), v)},
        {rows(c.out(dq, "dq"), dq), rows(c.out(dk, "dk"), dk), rows(c.out(dv, "dv"), dv)});
    return {dq, dk, dv, dweight_q, dweight_k};
  }

  static std::tuple<Tensor, Tensor, Tensor, Tensor> qkv_forward(const Tensor& qkv_in, int64_t heads,
                                                                const OptionalTensor& weight_q,
                                                                const OptionalTensor& weight_k, double norm_eps,
                                                                double eps) {
    Call c(qkv_in, heads, weight_q, weight_k, eps);
    const Tensor qkv = dense_rows(qkv_in);
    const ConstPtr x = c.in(qkv, "qkv");
    Tensor result = empty(qkv, {c.B, c.N, c.H * c.D}, qkv.scalar_type());
    run_forward(c, {third(x, 0, qkv, c.D), third(x, 1, qkv, c.D), third(x, 2, qkv, c.D)}, norm_eps,
                {c.out(result, "out"), result.stride(0), result.stride(1), c.D});
    return {result, c.state, c.rstd_q, c.rstd_k};
  }

  static std::tuple<Tensor, Tensor, Tensor> qkv_backward(const Tensor& dout_in, const Tensor& qkv_in,
                                                         const OptionalTensor& weight_q, const OptionalTensor& weight_k,
                                                         const Tensor& state, const Tensor& rstd_q,
                                                         const Tensor& rstd_k, double eps) {
    check(state.dim() == 4, "state must have shape [B, H, D+1, D]");
    Call c(qkv_in, state.size(1), weight_q, weight_k, eps);
    c.take(state, rstd_q, rstd_k);
    c.check_packed_rows(dout_in, "dout");
    const Tensor qkv = dense_rows(qkv_in), dout = dense_rows(dout_in);
    const ConstPtr x = c.in(qkv, "qkv");
    Tensor dqkv = empty(qkv, {c.B, c.N, 3 * c.H * c.D}, qkv.scalar_type());
    const Ptr d = c.out(dqkv, "dqkv");
    const auto [dweight_q, dweight_k] =
        run_backward(c, {c.in(dout, "dout"), dout.stride(0), dout.stride(1), c.D},
                     {third(x, 0, qkv, c.D), third(x, 1, qkv, c.D), third(x, 2, qkv, c.D)},
                     {third(d, 0, dqkv, c.D), third(d, 1, dqkv, c.D), third(d, 2, dqkv, c.D)});
    return {dqkv, dweight_q, dweight_k};
  }
};

}  // namespace sana_ext::glue
