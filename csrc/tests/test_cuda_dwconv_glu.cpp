// dwconv_glu's CUDA kernels under the emulator: against the formulas in double, in every dtype, on shapes of the tuned
// and of the generic path, and the same bits whatever the order of threads and blocks.
#include "../cuda/kernels/dwconv_glu.h"

#include <deque>

#include "../emulator/block.h"
#include "../emulator/memory.h"

#include "dwconv_glu_case.h"

namespace sana_ext::test {
namespace {

using emulator::GlobalMemory;

Results run(const Case& c, Operands& o, uint64_t seed) {
  emulator::set_seed(seed);
  Results r(c);
  std::deque<GlobalMemory> known;
  const auto know = [&](const char* name, Buffer& b, bool writable) {
    known.emplace_back(name, b.data(), static_cast<size_t>(b.count() * size_of(ConstPtr(b).dtype)), writable);
  };
  know("u", o.u, false), know("weight", o.weight, false), know("bias", o.bias, false), know("dout", o.dout, false);
  know("out", r.out, true), know("du", r.du, true), know("dweight", r.dweight, true), know("dbias", r.dbias, true);
  const cuda::DwconvGluCut cut = cuda::dwconv_glu_backward_cut(c.B, c.H, c.W, c.F);
  const int64_t parts = c.B * cut.strips * cut.tiles;
  Buffer partial(Dtype::kFloat32, parts * 10 * 2 * c.F), frozen(c.dtype, r.du.count());
  know("partial", partial, true), know("frozen", frozen, true);

  cuda::DwconvGluForward f{};
  f.B = c.B, f.H = c.H, f.W = c.W, f.F = c.F;
  f.u = o.u, f.u_stride_n = c.pitch(), f.u_stride_b = c.N() * c.pitch();
  f.weight = o.weight, f.out = r.out;
  if (c.bias) f.bias = o.bias;
  cuda::dwconv_glu_forward(f, nullptr);

  cuda::DwconvGluBackward b{};
  b.B = c.B, b.H = c.H, b.W = c.W, b.F = c.F;
  b.dout = o.dout, b.dout_stride_n = c.F, b.dout_stride_b = c.N() * c.F;
  b.u = f.u, b.u_stride_n = f.u_stride_n, b.u_stride_b = f.u_stride_b;
  b.weight = f.weight, b.bias = f.bias, b.du = r.du, b.partial = static_cast<float*>(partial.data());
  cuda::dwconv_glu_backward(b, nullptr);
  b.partial = nullptr, b.du = frozen;
  cuda::dwconv_glu_backward(b, nullptr);
  CHECK(same(r.du, frozen));  // whether or not the parameters' gradients are wanted

  cuda::DwconvGluSums s{};
  s.parts = parts, s.channels = 2 * c.F, s.partial = static_cast<const float*>(partial.data()), s.dweight = r.dweight;
  if (c.bias) s.dbias = r.dbias;
  cuda::dwconv_glu_sums(s, nullptr);
  return r;
}

void check_case(Case c, Random& random) {
  if (c.dtype == Dtype::kBFloat16 && c.F % 8 == 0 && c.gap % 8 == 0) c.sigmoid_error = 0x1p-12;  // tanh.approx
  Operands o(c, random);
  const Results first = run(c, o, 1), second = run(c, o, 2);
  compare(c, o, first);
  CHECK(same(first.out, second.out) && same(first.du, second.du));
  CHECK(same(first.dweight, second.dweight) && same(first.dbias, second.dbias));
}

void tests() {
  Random random(2);
  const Dtype fp32 = Dtype::kFloat32, bf16 = Dtype::kBFloat16, fp16 = Dtype::kFloat16;
  for (const Dtype dtype : {fp32, bf16, fp16}) {
    for (const bool bias : {true, false}) check_case({2, 3, 5, 8, dtype, bias ? dtype : fp32, bias, 8}, random);
    check_case({1, 1, 1, 1, dtype, dtype, true}, random);
    check_case({2, 3, 5, 7, dtype, dtype, true}, random);       // generic
    check_case({1, 5, 9, 40, dtype, dtype, true, 3}, random);   // generic by its strides
    check_case({2, 1, 7, 16, dtype, dtype, true, 0}, random);   // one row
    check_case({1, 9, 1, 24, dtype, dtype, true, 8}, random);   // one column, two strips
    check_case({1, 2, 19, 72, dtype, dtype, true, 0}, random);  // two groups of channels
    check_case({1, 2, 33, 8, dtype, dtype, true, 0}, random);   // two tiles
    check_case({1, 6, 70, 8, dtype, dtype, true, 8}, random);   // three tiles
    check_case({1, 5, 48, 8, dtype, dtype, true, 0}, random);   // two tiles of whole runs
    check_case({1, 2, 35, 3, dtype, dtype, true}, random);      // two tiles, generic
    check_case({3, 17, 8, 8, dtype, dtype, true, 0}, random);   // several strips
    check_case({1, 5, 32, 8, dtype, dtype, false, 0}, random);  // a whole tile
  }
  check_case({2, 4, 6, 16, bf16, fp16, true, 0}, random);
  check_case({2, 4, 6, 16, fp16, bf16, true, 0}, random);
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
