// dwconv_glu's kernels without torch: against the formulas in double, every dtype, odd sizes, strides, no bias, and the
// same bits however the work is cut.
#include "../cpu/kernels/dwconv_glu.h"

#include "dwconv_glu_case.h"

namespace sana_ext::test {
namespace {

Results run(const Case& c, const Operands& o, int64_t strips, int64_t pieces) {
  Results r(c);
  const int64_t items = c.B * strips * cpu::dwconv_glu_blocks(c.F);
  cpu::DwconvGluForward f{};
  f.B = c.B, f.H = c.H, f.W = c.W, f.F = c.F, f.strips = strips;
  f.u = o.u, f.u_stride_n = c.pitch(), f.u_stride_b = c.N() * c.pitch();
  f.weight = o.weight, f.out = r.out;
  if (c.bias) f.bias = o.bias;
  in_pieces(cpu::dwconv_glu_forward, f, items, pieces);

  Buffer partial(c.dtype == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32, c.B * strips * 10 * 2 * c.F);
  cpu::DwconvGluBackward b{};
  b.B = c.B, b.H = c.H, b.W = c.W, b.F = c.F, b.strips = strips;
  b.dout = o.dout, b.dout_stride_n = c.F, b.dout_stride_b = c.N() * c.F;
  b.u = f.u, b.u_stride_n = f.u_stride_n, b.u_stride_b = f.u_stride_b;
  b.weight = f.weight, b.bias = f.bias, b.du = r.du, b.partial = partial.data();
  in_pieces(cpu::dwconv_glu_backward, b, items, pieces);

  cpu::DwconvGluReduce s{};
  s.parts = c.B * strips, s.channels = 2 * c.F, s.partial = partial.data(), s.dweight = r.dweight;
  if (c.bias) s.dbias = r.dbias;
  in_pieces(cpu::dwconv_glu_reduce, s, cpu::dwconv_glu_blocks(2 * c.F), pieces);
  return r;
}

void tests() {
  Random random(2);
  const Dtype dtypes[][2] = {{Dtype::kFloat64, Dtype::kFloat64},
                             {Dtype::kFloat32, Dtype::kFloat32},
                             {Dtype::kBFloat16, Dtype::kBFloat16},
                             {Dtype::kFloat16, Dtype::kFloat16},
                             {Dtype::kBFloat16, Dtype::kFloat32}};
  const int64_t sizes[][4] = {{1, 1, 1, 1}, {2, 3, 5, 7}, {1, 17, 9, 16}, {1, 2, 19, 65}, {1, 9, 8, 130}};
  for (const auto& dtype : dtypes) {
    for (const auto& size : sizes) {
      for (const bool bias : {true, false}) {
        const Case c{size[0], size[1], size[2], size[3], dtype[0], dtype[1], bias};
        const Operands o(c, random);
        for (const int64_t strips : {int64_t{1}, (c.H + 7) / 8}) {
          const Results whole = run(c, o, strips, 1), cut = run(c, o, strips, 3);
          compare(c, o, whole);
          CHECK(same(whole.out, cut.out) && same(whole.du, cut.du));
          CHECK(same(whole.dweight, cut.dweight) && same(whole.dbias, cut.dbias));
        }
      }
    }
  }
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
