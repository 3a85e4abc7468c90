#include "kernels/linear_attention.h"

#include "../glue/linear_attention.h"
#include "glue.h"
#include "kernels/norm_modulate.h"

namespace sana_ext::cpu {
namespace {

constexpr int64_t kMaxChunks = 16;  // partial states per image: enough to share out, few enough to add up

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

  ConstPtr in(const Tensor& t, const char* name) const { return cpu::in(t, name); }
  Ptr out(Tensor& t, const char*) const { return cpu::out(t); }

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

void run_forward(Problem& p, const LinearAttentionInputs& x, double norm_eps, const LinearAttentionRows<Ptr>& result) {
  const LinearAttentionSize& s = p.s;
  p.allocate();
  if (s.B == 0) return;
  Tensor partial = p.partial_states();
  const LinearAttentionState a{s, norm_eps, x.k, x.v, in(p.weight_k, "weight_k"), data(p.rstd_k), data(partial)};
  parallel(linear_attention_state, a, s.B * chunks(s), p.grain(s.chunk));
  Tensor padded = s.P == s.D ? p.state : p.accumulators({s.B, s.H, s.D + 1, s.P});
  sum_states(p, chunks(s), partial, s.P, data(p.state), s.P == s.D ? nullptr : data(padded), nullptr);
  const int64_t blocks = (s.N + kLinearAttentionBlock - 1) / kLinearAttentionBlock;
  const LinearAttentionOutput o{s,       norm_eps, p.eps, x.q, in(p.weight_q, "weight_q"), data(padded), data(p.rstd_q),
                                result.p};
  parallel(linear_attention_output, o, s.B * blocks, p.grain(kLinearAttentionBlock));
}

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

std::tuple<Tensor, Tensor> run_backward(const Problem& p, const LinearAttentionRows<ConstPtr>& dout,
                                        const LinearAttentionInputs& x, const LinearAttentionGradients& d) {
  const LinearAttentionSize& s = p.s;
  const int64_t items = s.B * chunks(s), C = s.H * s.D;
  Tensor partial = p.partial_states(), padded = p.accumulators({s.B, s.H, s.D + 1, s.P}),
         transposed = p.accumulators({s.B, s.H, s.D, s.P});
  Tensor weight_q = p.accumulators({p.weight_q ? items : 0, C}), weight_k = p.accumulators({p.weight_k ? items : 0, C});
  sum_states(p, 1, p.state, s.D, nullptr, data(padded), data(transposed));
  const LinearAttentionBackwardQ a{s,
                                   p.eps,
                                   dout,
                                   x.q,
                                   in(p.weight_q, "weight_q"),
                                   const_data(p.rstd_q),
                                   data(padded),
                                   data(transposed),
                                   d.dq,
                                   data(partial),
                                   data(weight_q)};
  parallel(linear_attention_backward_q, a, items, p.grain(s.chunk));
  sum_states(p, chunks(s), partial, s.P, nullptr, data(padded), data(transposed));
  const LinearAttentionBackwardK c{
      s,    x.k,  x.v,           in(p.weight_k, "weight_k"), const_data(p.rstd_k), data(padded), data(transposed),
      d.dk, d.dv, data(weight_k)};
  parallel(linear_attention_backward_k, c, items, p.grain(s.chunk));
  return {sum_weight(p, p.weight_q, weight_q), sum_weight(p, p.weight_k, weight_k)};
}

using Ops = LinearAttentionOps<Problem>;

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) {
  m.impl("linear_attention_forward", TORCH_BOX(&Ops::forward));
  m.impl("linear_attention_backward", TORCH_BOX(&Ops::backward));
  m.impl("linear_attention_qkv_forward", TORCH_BOX(&Ops::qkv_forward));
  m.impl("linear_attention_qkv_backward", TORCH_BOX(&Ops::qkv_backward));
}

}  // namespace sana_ext::cpu
