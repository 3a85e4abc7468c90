// One case of the norm_modulate family, its operands and results, and the formulas in double: shared by the tests of
// the CPU kernels and of the emulated CUDA kernels.
#pragma once
#include "check_test.h"

namespace sana_ext::test {

// norm_modulate; gated_residual; residual_norm_modulate with and without gate
constexpr int kForms = 4;

struct Case {
  int64_t B, N, C;
  Dtype x, y;
  bool with_y, with_gate, with_n;
  int64_t gap = 3;  // elements between the rows of x
};

struct Operands {
  Buffer x, y, gate, shift, scale, dz, dn;
  explicit Operands(const Case& c, Random& r)
      : x(c.x, c.B * c.N * (c.C + c.gap), r),
        y(c.y, c.B * c.N * c.C, r),
        gate(c.x, c.B * c.C, r),
        shift(c.x, c.B * c.C, r),
        scale(c.x, c.B * c.C, r),
        dz(c.x, c.B * c.N * c.C, r),
        dn(c.y, c.B * c.N * c.C, r) {}
};

struct Results {
  bool has_dx = true;
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

inline void compare(const Case& c, const Operands& o, const Results& r) {
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
        z[i] = o.x[row * (c.C + c.gap) + i];
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
        if (r.has_dx)
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

}  // namespace sana_ext::test
