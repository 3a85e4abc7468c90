// norm_modulate's kernels without torch: against the formulas in double, in every dtype, with tails, strides and absent
// operands, and the same bits however the work is cut.
#include "../cpu/kernels/norm_modulate.h"

#include <cstring>

#include "check_test.h"

namespace sana_ext::test {
namespace {

using cpu::kNormModulateBlock;

struct Case {
  int64_t B, N, C;
  Dtype x, y;
  bool with_y, with_gate, with_n;
};

struct Operands {
  Buffer x, y, gate, shift, scale, dz, dn;
  explicit Operands(const Case& c, Random& r)
      : x(c.x, c.B * c.N * (c.C + 3), r),
        y(c.y, c.B * c.N * c.C, r),
        gate(c.x, c.B * c.C, r),
        shift(c.x, c.B * c.C, r),
        scale(c.x, c.B * c.C, r),
        dz(c.x, c.B * c.N * c.C, r),
        dn(c.y, c.B * c.N * c.C, r) {}
};

struct Results {
  Buffer z, n, mean, rstd, dx, dy, dshift, dscale, dgate;
  explicit Results(const Case& c, Dtype acc)
      : z(c.x, c.B * c.N * c.C),
        n(c.y, c.B * c.N * c.C),
        mean(acc, c.B * c.N),
        rstd(acc, c.B * c.N),
        dx(c.x, c.B * c.N * c.C),
        dy(c.y, c.B * c.N * c.C),
        dshift(acc, c.B * c.C),
        dscale(acc, c.B * c.C),
        dgate(acc, c.B * c.C) {}
};

Results run(const Case& c, const Operands& o, int64_t pieces) {
  const Dtype acc = c.x == Dtype::kFloat64 ? Dtype::kFloat64 : Dtype::kFloat32;
  Results r(c, acc);
  cpu::NormModulateForward f{};
  f.B = c.B, f.N = c.N, f.C = c.C, f.eps = 1e-6;
  f.x = o.x, f.x_stride_n = c.C + 3, f.x_stride_b = c.N * (c.C + 3);  // rows with a gap
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
    b.z_stride_n = c.with_y ? c.C : c.C + 3, b.z_stride_b = c.N * b.z_stride_n;
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

void compare(const Case& c, const Operands& o, const Results& r) {
  const bool fp64 = c.x == Dtype::kFloat64;
  const double acc = fp64 ? 0x1p-53 : 0x1p-24;
  const double sums = acc * 40 * static_cast<double>(c.N + 20);  // rounding of a sum over the rows of one image
  std::vector<double> z(c.C), total(c.C), dshift(c.C), dscale(c.C), dgate(c.C);
  for (int64_t b = 0; b < c.B; ++b) {
    for (auto* v : {&dshift, &dscale, &dgate}) v->assign(c.C, 0.0);
    for (int64_t i_n = 0; i_n < c.N; ++i_n) {
      const int64_t row = b * c.N + i_n;
      double sum = 0, squares = 0;
      for (int64_t i = 0; i < c.C; ++i) {
        z[i] = o.x[row * (c.C + 3) + i];
        if (c.with_y) {
          const double added = (c.with_gate ? o.gate[b * c.C + i] : 1.0) * o.y[row * c.C + i];
          z[i] += added;
          // One rounding of the product (none with an FMA), of the sum, of the store; 1e-7: the float16 subnormals.
          CHECK_CLOSE(r.z[row * c.C + i], z[i],
                      std::abs(z[i]) * (r.z.epsilon() + 2 * acc) + std::abs(added) * 2 * acc + 1e-7 * !fp64);
          z[i] = r.z[row * c.C + i];  // the norm sees what was stored
        }
        sum += z[i];
      }
      const double mean = sum / c.C;
      for (int64_t i = 0; i < c.C; ++i) squares += (z[i] - mean) * (z[i] - mean);
      const double rstd = 1 / std::sqrt(squares / c.C + 1e-6);
      double mean_g = 0, mean_gx = 0;
      for (int64_t i = 0; i < c.C; ++i) {
        total[i] = c.with_y || !c.with_n ? o.dz[row * c.C + i] : 0.0;
        if (!c.with_n) continue;
        const double xhat = (z[i] - mean) * rstd, scale = o.scale[b * c.C + i], dn = o.dn[row * c.C + i];
        const double n = xhat * (1 + scale) + o.shift[b * c.C + i];
        CHECK_CLOSE(r.n[row * c.C + i], n, (std::abs(n) + 1) * r.n.epsilon() + 64 * acc * rstd);
        mean_g += dn * (1 + scale) / c.C, mean_gx += dn * (1 + scale) * xhat / c.C;
        dshift[i] += dn, dscale[i] += dn * xhat;
      }
      for (int64_t i = 0; i < c.C; ++i) {
        if (c.with_n) {
          const double xhat = (z[i] - mean) * rstd, g = o.dn[row * c.C + i] * (1 + o.scale[b * c.C + i]);
          total[i] += (g - mean_g - xhat * mean_gx) * rstd;
        }
        const double rounding = 200 * acc * (1 + rstd * rstd);  // a row of one channel has rstd 1000
        CHECK_CLOSE(r.dx[row * c.C + i], total[i], (std::abs(total[i]) + 1e-2) * r.dx.epsilon() + rounding);
        if (!c.with_y) continue;
        const double gate = c.with_gate ? o.gate[b * c.C + i] : 1.0;
        CHECK_CLOSE(r.dy[row * c.C + i], gate * total[i],
                    (std::abs(gate * total[i]) + 1e-2) * r.dy.epsilon() + 2 * rounding);
        dgate[i] += total[i] * o.y[row * c.C + i];
      }
    }
    for (int64_t i = 0; i < c.C; ++i) {
      const int64_t k = b * c.C + i;
      if (c.with_n) {
        CHECK_CLOSE(r.dshift[k], dshift[i], sums);
        CHECK_CLOSE(r.dscale[k], dscale[i], 10 * sums);
      }
      if (c.with_gate && c.C > 1) CHECK_CLOSE(r.dgate[k], dgate[i], 100 * sums);
    }
  }
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
