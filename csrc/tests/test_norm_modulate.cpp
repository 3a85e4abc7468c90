// norm_modulate's kernels without torch: against the formulas in double, in every dtype, with tails, strides and absent
// operands, and the same bits however the work is cut.
#include "../cpu/kernels/norm_modulate.h"

#include "norm_modulate_case.h"

namespace sana_ext::test {
namespace {

using cpu::kNormModulateBlock;

Results run(const Case& c, const Operands& o, int64_t pieces) {
  const Dtype acc = c.x == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  Results r(c, acc);
  cpu::NormModulateForward f{};
  f.B = c.B, f.N = c.N, f.C = c.C, f.eps = 1e-6;
  f.x = o.x, f.x_stride_n = c.C + c.gap, f.x_stride_b = c.N * (c.C + c.gap);
  if (c.with_y) f.y = o.y, f.y_stride_n = c.C, f.y_stride_b = c.N * c.C, f.z = r.z;
  if (c.with_gate) f.gate = o.gate, f.gate_stride_b = c.C;
  if (c.with_n) {
    f.shift = o.shift, f.scale = o.scale, f.shift_stride_b = f.scale_stride_b = c.C;
    f.n = r.n, f.mean = r.mean.data(), f.rstd = r.rstd.data();
  }
  in_pieces(cpu::norm_modulate_forward, f, c.B * c.N, pieces);

  const int64_t blocks = (c.N + kNormModulateBlock - 1) / kNormModulateBlock;
  Buffer partial(acc, c.B * blocks * 3 * c.C);
  cpu::NormModulateBackward b{};
  b.B = c.B, b.N = c.N, b.C = c.C, b.fp64 = acc == Dtype::kFloat64;
  if (c.with_y || !c.with_n) b.dz = o.dz, b.dz_stride_n = c.C, b.dz_stride_b = c.N * c.C;
  if (c.with_n) {
    b.dn = o.dn, b.dn_stride_n = c.C, b.dn_stride_b = c.N * c.C;
    b.z = c.with_y ? ConstPtr(r.z) : ConstPtr(o.x);
    b.z_stride_n = c.with_y ? c.C : c.C + c.gap, b.z_stride_b = c.N * b.z_stride_n;
    b.scale = o.scale, b.scale_stride_b = c.C, b.mean = r.mean.data(), b.rstd = r.rstd.data();
  }
  if (c.with_y) b.y = o.y, b.y_stride_n = c.C, b.y_stride_b = c.N * c.C, b.dy = r.dy;
  if (c.with_gate) b.gate = o.gate, b.gate_stride_b = c.C;
  b.dx = r.dx, b.partial = partial.data();
  in_pieces(cpu::norm_modulate_backward, b, c.B * blocks, pieces);

  cpu::PartialSums s{};
  s.B = c.B, s.blocks = blocks, s.R = 3, s.C = c.C, s.partial = partial.data(), s.fp64 = b.fp64;
  s.out[0] = r.dshift, s.out[1] = r.dscale, s.out[2] = r.dgate;
  in_pieces(cpu::sum_partials, s, c.B * 3, pieces);
  return r;
}

void tests() {
  const Dtype dtypes[] = {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  Random random(1);
  for (const Dtype x : dtypes) {
    for (const Dtype y : dtypes) {
      if ((x == Dtype::kFloat64) != (y == Dtype::kFloat64)) continue;
      for (const int64_t C : {1, 3, 16, 37, 100}) {
        for (const int forms : {0, 1, 2, 3}) {
          // norm_modulate; gated_residual; residual_norm_modulate with and without gate
          const Case c{2, 35, C, x, y, forms != 0, forms == 1 || forms == 2, forms != 1};
          const Operands o(c, random);
          const Results whole = run(c, o, 1), cut = run(c, o, 3);
          compare(c, o, whole);
          CHECK(same(whole.z, cut.z) && same(whole.n, cut.n) && same(whole.dx, cut.dx) && same(whole.dy, cut.dy));
          CHECK(same(whole.dshift, cut.dshift) && same(whole.dscale, cut.dscale) && same(whole.dgate, cut.dgate));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
