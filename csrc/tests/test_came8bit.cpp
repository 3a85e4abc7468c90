// The CPU kernels of came8bit at one instruction set level: against the formulas in double, the same bits however the
// items are shared out, and what is not finite.
#include "../cpu/kernels/came8bit.h"

#include "came8bit_case.h"

namespace sana_ext::test {
namespace {

using Kernel = void (*)(const cpu::Came8bit&, int64_t, int64_t);

struct Arguments {
  Arguments(CameParameter& p, const CameNumbers& h) {
    const auto number = [](Buffer& b) { return static_cast<float*>(b.data()); };
    const int64_t B = p.shape.B, R = p.shape.R, C = p.shape.C, f = p.shape.factored ? 1 : 0;
    a.B = B, a.R = R, a.C = C, a.factored = p.shape.factored, a.linear = p.linear;
    a.block = p.cut.length, a.unit_rows = p.cut.unit_rows, a.units = p.cut.units, a.blocks = p.cut.blocks;
    a.chunk_units = a.units / 3 + 1, a.chunks = (a.units + a.chunk_units - 1) / a.chunk_units;
    a.p = p.p, a.g = p.g, a.codes = p.quantised ? p.codes.data() : nullptr, a.scales = number(p.scales);
    a.m = number(p.m), a.second = number(p.second), a.col = number(p.col);
    a.res_row = number(p.res_row), a.res_col = number(p.res_col);
    a.w_total = number(p.work), a.w_col = a.w_total + f * B, a.w_square = a.w_col + f * B * C;
    a.w_res_total = a.w_square + 1, a.w_res_col = a.w_res_total + f * B;
    a.w_row = a.w_res_col + f * B * C, a.w_res_row = a.w_row + f * B * R;
    partial.resize(B * a.chunks * C), sums.resize(B * a.chunks);
    a.sums = sums.data(), a.not_finite = &not_finite;
    a.lr = h.lr, a.weight_decay = h.weight_decay, a.beta1 = h.beta1, a.beta2 = h.beta2, a.beta3 = h.beta3;
    a.eps1 = h.eps1, a.eps2 = h.eps2, a.clip = h.clip, a.factor = h.factor, a.correct1 = h.correct1;
    a.correct2 = h.correct2, a.correct3 = h.correct3, a.rows = double(R), a.numel = double(p.n);
  }
  void phase(int64_t number, int64_t pieces) {
    const Kernel kernels[] = {cpu::came8bit_squares, cpu::came8bit_norm, cpu::came8bit_residual, cpu::came8bit_apply};
    a.partial = a.chunks == 1 ? (number == 0 ? a.w_col : a.w_res_col) : partial.data();
    cpu::came8bit_before(a, number, number + 1);
    in_pieces(kernels[number], a, a.B * a.chunks, pieces);
    cpu::came8bit_after(a, number, number + 1);
  }

  cpu::Came8bit a{};
  std::vector<float> partial;
  std::vector<double> sums;
  int not_finite = 0;
};

void steps(Dtype p, Dtype g) {
  Random random(static_cast<uint64_t>(p) * 10 + static_cast<uint64_t>(g));
  for (const CameParameter& before : came_parameters(p, g, random)) {
    CameParameter whole = before, pieces = before;
    Arguments first(whole, {}), second(pieces, {});
    for (int64_t phase = 0; phase < 4; ++phase) first.phase(phase, 1), second.phase(phase, 3);
    CHECK(first.not_finite == 0);
    check_came(before, whole, {});
    CHECK(same(whole, pieces));
    if (before.n == 0) continue;
    for (const double bad : {double(NAN), HUGE_VAL, 1e30}) {
      CameParameter broken = before;
      broken.g.set(before.n - 1, bad);
      Arguments arguments(broken, {});
      arguments.phase(0, 2);
      CHECK(arguments.not_finite == 1);
    }
  }
}

void tests() {
  for (const Dtype p : {Dtype::kFloat32, Dtype::kBFloat16})
    for (const Dtype g : {Dtype::kFloat32, Dtype::kBFloat16}) steps(p, g);
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
