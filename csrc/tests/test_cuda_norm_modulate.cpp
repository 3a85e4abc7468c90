// The CUDA kernels of the norm_modulate family under the emulator: against the formulas in double, in every dtype, on
// shapes of the tuned and of the generic path, and the same bits whatever the order of threads and blocks.
#include "../cuda/kernels/norm_modulate.h"

#include <deque>

#include "../emulator/block.h"
#include "../emulator/memory.h"

#include "norm_modulate_case.h"

namespace sana_ext::test {
namespace {

using emulator::GlobalMemory;

Results run(const Case& c, Operands& o, uint64_t seed) {
  emulator::set_seed(seed);
  Results r(c, Dtype::kFloat32);
  r.has_dx = c.with_n;  // in the gated form dx is the incoming gradient itself
  const int64_t rows_per_block = cuda::norm_modulate_rows_per_block(c.B, c.N);
  const int64_t blocks = (c.N + rows_per_block - 1) / rows_per_block;
  Buffer partial(Dtype::kFloat32, c.B * blocks * 3 * c.C);
  std::deque<GlobalMemory> known;
  const auto know = [&](const char* name, Buffer& b, bool writable) {
    known.emplace_back(name, b.data(), static_cast<size_t>(b.count() * size_of(ConstPtr(b).dtype)), writable);
  };
  know("x", o.x, false), know("y", o.y, false), know("gate", o.gate, false), know("shift", o.shift, false);
  know("scale", o.scale, false), know("dz", o.dz, false), know("dn", o.dn, false);
  know("z", r.z, true), know("n", r.n, true), know("mean", r.mean, true), know("rstd", r.rstd, true);
  know("dx", r.dx, true), know("dy", r.dy, true), know("dshift", r.dshift, true), know("dscale", r.dscale, true);
  know("dgate", r.dgate, true), know("partial", partial, true);

  cuda::NormModulateForward f{};
  f.B = c.B, f.N = c.N, f.C = c.C, f.eps = 1e-6f;
  f.x = o.x, f.x_stride_n = c.C + c.gap, f.x_stride_b = c.N * (c.C + c.gap);
  if (c.with_y) f.y = o.y, f.y_stride_n = c.C, f.y_stride_b = c.N * c.C, f.z = r.z;
  if (c.with_gate) f.gate = o.gate, f.gate_stride_b = c.C;
  auto *mean = static_cast<float*>(r.mean.data()), *rstd = static_cast<float*>(r.rstd.data());
  if (c.with_n) {
    f.shift = o.shift, f.scale = o.scale, f.shift_stride_b = f.scale_stride_b = c.C;
    f.n = r.n, f.mean = mean, f.rstd = rstd;
  }
  cuda::norm_modulate_forward(f, nullptr);

  cuda::NormModulateBackward b{};
  b.B = c.B, b.N = c.N, b.C = c.C, b.rows_per_block = rows_per_block;
  if (c.with_y) b.dz = o.dz, b.dz_stride_n = c.C, b.dz_stride_b = c.N * c.C;
  if (c.with_n) {
    b.dn = o.dn, b.dn_stride_n = c.C, b.dn_stride_b = c.N * c.C;
    b.z = c.with_y ? ConstPtr(r.z) : ConstPtr(o.x);
    b.z_stride_n = c.with_y ? c.C : c.C + c.gap, b.z_stride_b = c.N * b.z_stride_n;
    b.scale = o.scale, b.scale_stride_b = c.C, b.mean = mean, b.rstd = rstd;
    b.dx = r.dx;
  }
  if (c.with_y) b.y = o.y, b.y_stride_n = c.C, b.y_stride_b = c.N * c.C, b.dy = r.dy;
  if (c.with_gate) b.gate = o.gate, b.gate_stride_b = c.C;
  b.partial = static_cast<float*>(partial.data());
  cuda::norm_modulate_backward(b, nullptr);

  cuda::PartialSums s{};
  s.B = c.B, s.blocks = blocks, s.C = c.C, s.partial = b.partial;
  if (c.with_n) s.out[0] = r.dshift, s.out[1] = r.dscale;
  if (c.with_gate) s.out[2] = r.dgate;
  cuda::sum_partials(s, nullptr);
  return r;
}

void check_case(const Case& c, Random& random) {
  Operands o(c, random);
  const Results first = run(c, o, 1), second = run(c, o, 2);
  compare(c, o, first);
  CHECK(same(first.z, second.z) && same(first.n, second.n) && same(first.dx, second.dx) && same(first.dy, second.dy));
  CHECK(same(first.dshift, second.dshift) && same(first.dscale, second.dscale) && same(first.dgate, second.dgate));
}

void tests() {
  const Dtype dtypes[] = {Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16};
  Random random(1);
  for (int form = 0; form < kForms; ++form) {
    const auto make = [&](int64_t B, int64_t N, int64_t C, Dtype x, Dtype y, int64_t gap) {
      return Case{B, N, C, x, y, form != 0, form == 1 || form == 2, form != 1, gap};
    };
    for (const Dtype x : dtypes) {
      for (const Dtype y : dtypes) check_case(make(2, 7, 24, x, y, 8), random);
      for (const int64_t C : {1, 3, 37, 40}) check_case(make(2, 5, C, x, x, 3), random);  // generic
      for (const int64_t C : {8, 1152, 2240}) check_case(make(1, 5, C, x, x, 0), random);
    }
    for (const int64_t C : {1288, 2304}) check_case(make(1, 2, C, Dtype::kBFloat16, Dtype::kFloat16, 0), random);
    check_case(make(3, 13, 1160, Dtype::kBFloat16, Dtype::kBFloat16, 8), random);
    check_case(make(1, 73, 40, Dtype::kFloat32, Dtype::kFloat32, 8), random);    // more partial sums than slices
    check_case(make(1, 1, 2312, Dtype::kBFloat16, Dtype::kFloat32, 0), random);  // longer than a tuned row
    check_case(make(1, 1, 8200, Dtype::kFloat16, Dtype::kBFloat16, 0), random);  // longer than shared memory holds
  }
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
