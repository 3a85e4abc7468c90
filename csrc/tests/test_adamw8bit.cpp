// The CPU kernels of adamw8bit at one instruction set level: against the formulas in double, the same bits however the
// blocks are shared out, and every place of a NaN.
#include "../cpu/kernels/adamw8bit.h"

#include "adamw8bit_case.h"

namespace sana_ext::test {
namespace {

std::vector<cpu::AdamW8bitTensor> table(std::vector<AdamParameter>& list, const AdamNumbers& h, int64_t& blocks) {
  std::vector<cpu::AdamW8bitTensor> result;
  blocks = 0;
  for (AdamParameter& p : list) {
    cpu::AdamW8bitTensor t{};
    t.n = p.n, t.first_block = blocks, t.p = p.p, t.g = p.g, t.state1 = p.state1(), t.state2 = p.state2(), t.seed = -1;
    if (p.quantised)
      t.absmax1 = static_cast<float*>(p.absmax1.data()), t.absmax2 = static_cast<float*>(p.absmax2.data());
    t.h = {float(h.beta1), float(h.rest1), float(h.beta2), float(h.rest2), float(h.size),
           float(h.root),  float(h.eps),   float(h.keep),  float(h.factor)};
    blocks += p.blocks();
    result.push_back(t);
  }
  return result;
}

void steps(Dtype p, Dtype g) {
  Random random(static_cast<uint64_t>(p) * 10 + static_cast<uint64_t>(g));
  const std::vector<AdamParameter> before = adam_parameters(p, g, random);
  std::vector<AdamParameter> whole = before, pieces = before;
  const AdamNumbers h;
  int64_t blocks = 0;
  const auto tensors = table(whole, h, blocks);
  cpu::adamw8bit_step({static_cast<int64_t>(tensors.size()), tensors.data(), false}, 0, blocks);
  const auto others = table(pieces, h, blocks);
  in_pieces(cpu::adamw8bit_step, cpu::AdamW8bit{static_cast<int64_t>(others.size()), others.data(), false}, blocks, 7);
  for (size_t i = 0; i < before.size(); ++i) {
    check_step(before[i], whole[i], h);
    CHECK(same(whole[i], pieces[i]));
  }
}

void finite(Dtype dtype) {
  Random random(3);
  std::vector<AdamParameter> list = adam_parameters(Dtype::kFloat32, dtype, random);
  int64_t blocks = 0;
  const auto tensors = table(list, {}, blocks);
  const auto found = [&] {
    int32_t flag = 0;
    cpu::adamw8bit_check({static_cast<int64_t>(tensors.size()), tensors.data(), 0.5f, &flag}, 0, blocks);
    return flag == 1;
  };
  CHECK(!found());
  for (AdamParameter& p : list) {
    for (int64_t i = 0; i < p.n; i += 37) {
      const double kept = p.g[i];
      p.g.set(i, i % 2 == 0 ? NAN : HUGE_VAL);
      CHECK(found());
      p.g.set(i, kept);
    }
  }
  CHECK(!found());
}

void tests() {
  for (const Dtype p : {Dtype::kFloat32, Dtype::kBFloat16})
    for (const Dtype g : {Dtype::kFloat32, Dtype::kBFloat16}) steps(p, g);
  for (const Dtype g : {Dtype::kFloat32, Dtype::kBFloat16}) finite(g);
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
