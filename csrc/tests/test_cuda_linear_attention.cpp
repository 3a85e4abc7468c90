// linear_attention's CUDA kernels under the emulator: against the formulas in double, in every dtype, on shapes of the
// tuned and of the generic path, and the same bits whatever the order of threads and blocks.
#include "../cuda/kernels/linear_attention.h"

#include <deque>

#include "../emulator/block.h"
#include "../emulator/memory.h"

#include "linear_attention_case.h"

namespace sana_ext::test {
namespace {

using emulator::GlobalMemory;

// Rows of C elements every `pitch`, as a tensor [B, N, H, D]; of a packed tensor where `offset` says so.
ConstPtr at(ConstPtr p, int64_t offset) {
  return {static_cast<const char*>(p.data) + offset * size_of(p.dtype), p.dtype};
}
Ptr at(Ptr p, int64_t offset) { return {static_cast<char*>(p.data) + offset * size_of(p.dtype), p.dtype}; }
template <class Pointer>
LinearAttentionRows<Pointer> rows(const Case& c, Pointer p, int64_t pitch, int64_t offset = 0) {
  return {at(p, offset), c.N * pitch, pitch, c.D};
}

// `tokens` of a part; `packed`: q, k and v, and their gradients, are thirds of one tensor.
Results run(const Case& c, Operands& o, int64_t tokens, bool packed, uint64_t seed) {
  emulator::set_seed(seed);
  Results r(c);
  const int64_t B = c.B, N = c.N, H = c.H, C = c.C();
  const cuda::LinearAttentionSize size{B, N, H, c.D, tokens};
  const int64_t state_size = H * (c.D + 1) * c.D;
  std::deque<GlobalMemory> known;
  const auto know = [&](const char* name, Buffer& b, bool writable) {
    known.emplace_back(name, b.data(), static_cast<size_t>(b.count() * size_of(ConstPtr(b).dtype)), writable);
    return static_cast<float*>(b.data());
  };
  Buffer qkv(c.dtype, packed ? B * N * 3 * C : 0), dqkv(c.dtype, packed ? B * N * 3 * C : 0);
  const auto each_packed = [&](const auto& visit) {
    for (int64_t row = 0; row < B * N * packed; ++row)
      for (int64_t i = 0; i < C; ++i)
        for (int64_t third = 0; third < 3; ++third) visit(third, row, i, (row * 3 + third) * C + i);
  };
  each_packed([&](int64_t third, int64_t row, int64_t i, int64_t to) {
    qkv.set(to, (third == 0 ? o.q : third == 1 ? o.k : o.v)[row * c.pitch() + i]);
  });
  Buffer partial(Dtype::kFloat32, B * size.parts() * state_size), dstate(Dtype::kFloat32, B * state_size);
  Buffer rstd_q(Dtype::kFloat32, B * N), rstd_k(Dtype::kFloat32, B * N), sums(Dtype::kFloat32, B * N);
  Buffer per_head(Dtype::kFloat32, B * H * N), work(Dtype::kFloat32, 2 * B * H * N);
  know("weight_q", o.weight_q, false), know("weight_k", o.weight_k, false), know("dout", o.dout, false);
  LinearAttentionRows<ConstPtr> q, k, v;
  LinearAttentionRows<Ptr> dq, dk, dv;
  if (packed) {
    know("qkv", qkv, false), know("dqkv", dqkv, true);
    q = rows<ConstPtr>(c, qkv, 3 * C), k = rows<ConstPtr>(c, qkv, 3 * C, C), v = rows<ConstPtr>(c, qkv, 3 * C, 2 * C);
    dq = rows<Ptr>(c, dqkv, 3 * C), dk = rows<Ptr>(c, dqkv, 3 * C, C), dv = rows<Ptr>(c, dqkv, 3 * C, 2 * C);
  } else {
    know("q", o.q, false), know("k", o.k, false), know("v", o.v, false);
    know("dq", r.dq, true), know("dk", r.dk, true), know("dv", r.dv, true);
    q = rows<ConstPtr>(c, o.q, c.pitch()), k = rows<ConstPtr>(c, o.k, c.pitch()), v = rows<ConstPtr>(c, o.v, c.pitch());
    dq = rows<Ptr>(c, r.dq, C), dk = rows<Ptr>(c, r.dk, C), dv = rows<Ptr>(c, r.dv, C);
  }
  know("out", r.out, true), know("dweight_q", r.dweight_q, true), know("dweight_k", r.dweight_k, true);
  float *const state = know("state", r.state, true), *const d_state = know("dstate", dstate, true);
  float *const parts = know("partial", partial, true), *const row_sums = know("sums", sums, true);
  float *const heads = know("per_head", per_head, true), *const for_generic = know("work", work, true);
  float *const stat_q = know("rstd_q", rstd_q, true), *const stat_k = know("rstd_k", rstd_k, true);

  const ConstPtr none{};
  const ConstPtr weight_q = c.norms ? ConstPtr(o.weight_q) : none, weight_k = c.norms ? ConstPtr(o.weight_k) : none;
  const float norm_eps = static_cast<float>(kNormEps);
  const float eps = c.norms && !c.has_rstd_q() ? 0.0f : static_cast<float>(c.eps);
  float* const rk = c.norms ? stat_k : nullptr;
  float* const rq = c.has_rstd_q() ? stat_q : nullptr;
  if (rk != nullptr) cuda::row_rstd({size, norm_eps, k, rk}, nullptr);
  if (rq != nullptr) cuda::row_rstd({size, norm_eps, q, rq}, nullptr);
  cuda::linear_attention_state({size, k, v, weight_k, rk, parts}, nullptr);
  cuda::sum_parts({B, size.parts(), state_size, parts, state}, nullptr);
  cuda::linear_attention_output({size, eps, q, weight_q, rq, state, rows<Ptr>(c, r.out, C)}, nullptr);

  const auto dout = rows<ConstPtr>(c, o.dout, c.pitch());
  cuda::LinearAttentionBackwardQ a{size, eps, dout, q, weight_q, rq, state, row_sums, dq, parts, for_generic};
  CHECK(cuda::is_tuned(a) == (c.D == 32 && c.dtype != Dtype::kFloat32 && c.gap % 8 == 0));
  if (rq != nullptr) {
    cuda::linear_attention_backward_q_rows(a, heads, nullptr);
    cuda::sum_parts({B, H, N, heads, row_sums}, nullptr);
  }
  cuda::linear_attention_backward_q(a, nullptr);
  cuda::sum_parts({B, size.parts(), state_size, parts, d_state}, nullptr);
  cuda::LinearAttentionBackwardK b{size, k, v, weight_k, rk, d_state, row_sums, dk, dv};
  if (rk != nullptr) {
    cuda::linear_attention_backward_k_rows(b, heads, nullptr);
    cuda::sum_parts({B, H, N, heads, row_sums}, nullptr);
  }
  cuda::linear_attention_backward_k(b, nullptr);
  if (c.norms) cuda::weight_gradients({size, state, d_state, weight_q, weight_k, r.dweight_q, r.dweight_k}, nullptr);
  each_packed([&](int64_t third, int64_t row, int64_t i, int64_t from) {
    (third == 0 ? r.dq : third == 1 ? r.dk : r.dv).set(row * C + i, dqkv[from]);
  });
  return r;
}

void check_case(const Case& c, Random& random, int64_t tokens = 16, bool packed = false) {
  Operands o(c, random);
  for (int64_t i = 0; i < c.C() && c.B > 0; ++i) o.q.set(i, 0);  // a denominator of 0 where eps does not count
  const Results first = run(c, o, tokens, packed, 1), second = run(c, o, tokens, packed, 2);
  // A number that was computed goes to the tensor cores as two 16-bit terms.
  compare(c, o, first, c.dtype == Dtype::kFloat32 ? 40 * 0x1p-24 : 0x1p-16, 1.01);
  CHECK(same(first.out, second.out) && same(first.state, second.state) && same(first.dq, second.dq));
  CHECK(same(first.dk, second.dk) && same(first.dv, second.dv));
  CHECK(same(first.dweight_q, second.dweight_q) && same(first.dweight_k, second.dweight_k));
}

void tests() {
  Random random(5);
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  for (const double eps : {1e-15, 1e-8}) {
    for (const bool norms : {false, true}) {
      for (const Dtype dtype : dtypes) {
        const auto make = [&](int64_t B, int64_t N, int64_t H, int64_t D, int64_t gap = 8) {
          return Case{B, N, H, D, dtype, norms, eps, gap};
        };
        for (const int64_t N : {1, 13, 16, 37}) check_case(make(2, N, 3, 32), random);
        check_case(make(1, 131, 1, 32), random, 48);
        check_case(make(1, 131, 1, 32), random, 144);  // one part: the ring of tiles goes round
        check_case(make(2, 19, 3, 32), random, 16, true);
        for (const int64_t D : {1, 8, 16, 33}) check_case(make(1, 13, 2, D), random);
        check_case(make(2, 5, 3, 32, 3), random);  // unaligned rows
        check_case(make(0, 4, 2, 32), random);
        check_case(make(0, 4, 2, 16), random);
        Case mixed = make(1, 40, 2, 32);
        mixed.fp32_weights = true;
        check_case(mixed, random, 16);
      }
      check_case({1, 50, 36, 32, Dtype::kBFloat16, norms, eps, 0}, random, 32);
      // The ends of fp16, where states and denominators leave its range; dout keeps dq inside.
      for (const double q : {1e-6, 1.0, 3e4})
        for (const double k : {1e-6, 1.0, 3e4}) {
          Case c{1, 35, 2, 32, Dtype::kFloat16, norms, eps, 0};
          c.q_size = q, c.k_size = k, c.dout_size = q < 1 || k < 1 ? 1e-4 : 1.0;
          check_case(c, random);
        }
    }
  }
  // An eps that is felt, also in the gradient through the row scale of q.
  for (const Dtype dtype : dtypes) check_case({2, 21, 3, 32, dtype, true, 2.0, 8}, random);
  const int64_t shapes[][3] = {{2, 1024, 70}, {32, 1024, 70}, {1, 16384, 70}, {1, 1, 1}, {3, 4097, 36}};
  for (const auto& [B, N, H] : shapes) {
    const int64_t tokens = cuda::linear_attention_tokens(B, N, H);
    CHECK(tokens % 16 == 0 && tokens > 0 && (tokens >= 112 || N < 112));
    CHECK(B * H * ((N + tokens - 1) / tokens) <= 8448);
  }
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
