// linear_attention's kernels without torch: against the formulas in double, with and without norms, every dtype, head
// dimensions on both paths, ragged token counts, strides, and the same bits however the work is cut.
#include "../cpu/kernels/linear_attention.h"

#include "../cpu/kernels/norm_modulate.h"
#include "linear_attention_case.h"

namespace sana_ext::test {
namespace {

Results run(const Case& c, const Operands& o, int64_t pieces) {
  Results r(c);
  const int64_t P = (c.D + cpu::kLinearAttentionPad - 1) / cpu::kLinearAttentionPad * cpu::kLinearAttentionPad;
  const int64_t chunk = cpu::kLinearAttentionBlock, chunks = (c.N + chunk - 1) / chunk, items = c.B * chunks;
  const cpu::LinearAttentionSize size{c.B, c.N, c.H, c.D, P, chunk, c.fp64()};
  const auto in = [&](const Buffer& b) { return LinearAttentionRows<ConstPtr>{b, c.N * c.pitch(), c.pitch(), c.D}; };
  const auto out = [&](Buffer& b) { return LinearAttentionRows<Ptr>{b, c.N * c.C(), c.C(), c.D}; };
  const ConstPtr none{};
  const ConstPtr weight_q = c.norms ? ConstPtr(o.weight_q) : none, weight_k = c.norms ? ConstPtr(o.weight_k) : none;
  Buffer partial(c.acc(), items * c.H * (c.D + 1) * P), padded(c.acc(), c.B * c.H * (c.D + 1) * P);
  Buffer transposed(c.acc(), c.B * c.H * c.D * P), rstd_q(c.acc(), c.B * c.N), rstd_k(c.acc(), c.B * c.N);
  Buffer partial_q(c.acc(), items * c.C()), partial_k(c.acc(), items * c.C());
  const auto sum = [&](int64_t parts, const void* from, int64_t width, void* state) {
    const cpu::LinearAttentionSum a{size, parts, from, width, state, padded.data(), transposed.data()};
    in_pieces(cpu::linear_attention_sum, a, c.B * c.H, pieces);
  };

  void* const rq = c.has_rstd_q() ? rstd_q.data() : nullptr;
  void* const rk = c.norms ? rstd_k.data() : nullptr;
  const cpu::LinearAttentionState s{size, kNormEps, in(o.k), in(o.v), weight_k, rk, partial.data()};
  in_pieces(cpu::linear_attention_state, s, items, pieces);
  sum(chunks, partial.data(), P, r.state.data());
  const cpu::LinearAttentionOutput f{size, kNormEps, c.eps, in(o.q), weight_q, padded.data(), rq, r.out};
  in_pieces(cpu::linear_attention_output, f,
            c.B * ((c.N + cpu::kLinearAttentionBlock - 1) / cpu::kLinearAttentionBlock), pieces);

  sum(1, r.state.data(), c.D, nullptr);
  const cpu::LinearAttentionBackwardQ q{size,
                                        c.eps,
                                        in(o.dout),
                                        in(o.q),
                                        weight_q,
                                        rq,
                                        padded.data(),
                                        transposed.data(),
                                        out(r.dq),
                                        partial.data(),
                                        c.norms ? partial_q.data() : nullptr};
  in_pieces(cpu::linear_attention_backward_q, q, items, pieces);
  sum(chunks, partial.data(), P, nullptr);
  const cpu::LinearAttentionBackwardK k{
      size,          in(o.k),           in(o.v),   weight_k,  rk,
      padded.data(), transposed.data(), out(r.dk), out(r.dv), c.norms ? partial_k.data() : nullptr};
  in_pieces(cpu::linear_attention_backward_k, k, items, pieces);
  if (!c.norms) return r;
  for (auto [from, to] : {std::pair{&partial_q, &r.dweight_q}, std::pair{&partial_k, &r.dweight_k}}) {
    cpu::PartialSums a{};
    a.B = 1, a.blocks = items, a.R = 1, a.C = c.C(), a.partial = from->data(), a.out[0] = *to, a.fp64 = c.fp64();
    in_pieces(cpu::sum_partials, a, 1, 1);
  }
  return r;
}

// 16-bit kernels round where diffusers rounds: a few steps of the input's precision on every term.
double unit(const Case& c, const Operands& o) {
  const double input = o.q.epsilon(), acc = c.fp64() ? 0x1p-53 : 0x1p-24;
  return 40 * acc + (input > acc ? 8 * input : 0.0);
}

void tests() {
  Random random(3);
  const int64_t sizes[][4] = {{1, 1, 1, 1},   {2, 70, 3, 4},  {1, 131, 2, 32},
                              {2, 64, 1, 32}, {1, 67, 2, 40}, {1, 9, 2, 64}};
  for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const auto& size : sizes) {
      for (const double eps : {1e-15, 1e-8}) {
        for (const bool norms : {false, true}) {
          const Case c{size[0], size[1], size[2], size[3], dtype, norms, eps};
          const Operands o(c, random);
          const Results whole = run(c, o, 1), cut = run(c, o, 3);
          compare(c, o, whole, unit(c, o), 0);
          CHECK(same(whole.out, cut.out) && same(whole.state, cut.state) && same(whole.dq, cut.dq));
          CHECK(same(whole.dk, cut.dk) && same(whole.dv, cut.dv));
          CHECK(same(whole.dweight_q, cut.dweight_q) && same(whole.dweight_k, cut.dweight_k));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
