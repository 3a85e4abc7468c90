// One call of linear_attention as both glues see it: sizes, checks, and what the forward leaves for the backward.
#pragma once
#include "../common/rows.h"
#include "glue.h"

namespace sana_ext::cpu {

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

}  // namespace sana_ext::cpu
