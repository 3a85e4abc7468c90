// One case of linear_attention, its operands and results, and the formulas in double: shared by the tests of the CPU
// kernels and of the emulated CUDA kernels.
#pragma once
#include "check_test.h"

namespace sana_ext::test {

constexpr double kNormEps = 1e-5;

struct Case {
  int64_t B, N, H, D;
  Dtype dtype;
  bool norms;
  double eps;
  int64_t gap = 3;  // elements between rows
  double q_size = 1.0, k_size = 1.0, dout_size = 1.0;
  bool fp32_weights = false;
  int64_t C() const { return H * D; }
  int64_t pitch() const { return C() + gap; }
  bool fp64() const { return dtype == Dtype::kFloat64; }
  // The glue's rule: the query norm's row scale is kept where eps is not negligible.
  bool has_rstd_q() const { return norms && (eps > 1e-12 || fp64()); }
  Dtype acc() const { return fp64() ? Dtype::kFloat64 : Dtype::kFloat32; }
};

struct Operands {
  Buffer q, k, v, dout, weight_q, weight_k;
  Operands(const Case& c, Random& r)
      : q(c.dtype, c.B * c.N * c.pitch(), r),
        k(c.dtype, c.B * c.N * c.pitch(), r),
        v(c.dtype, c.B * c.N * c.pitch(), r),
        dout(c.dtype, c.B * c.N * c.pitch(), r),
        weight_q(c.fp32_weights ? Dtype::kFloat32 : c.dtype, c.C(), r),
        weight_k(c.fp32_weights ? Dtype::kFloat32 : c.dtype, c.C(), r) {
    for (int64_t i = 0; i < q.count(); ++i) {
      q.set(i, q[i] * c.q_size), k.set(i, k[i] * c.k_size);
      dout.set(i, dout[i] * c.dout_size);
    }
  }
};

struct Results {
  Buffer out, state, dq, dk, dv, dweight_q, dweight_k;
  explicit Results(const Case& c)
      : out(c.dtype, c.B * c.N * c.C()),
        state(c.acc(), c.B * c.H * (c.D + 1) * c.D),
        dq(c.dtype, c.B * c.N * c.C()),
        dk(c.dtype, c.B * c.N * c.C()),
        dv(c.dtype, c.B * c.N * c.C()),
        dweight_q(c.acc(), c.C()),
        dweight_k(c.acc(), c.C()) {}
};

// A sum and the sum of its terms' magnitudes, which bounds its rounding error.
struct Term {
  double value = 0, size = 0;
  void add(double x, double magnitude) { value += x, size += magnitude; }
  void add(double x) { add(x, std::abs(x)); }
};

// `unit`: relative rounding error of one term of a sum; `roundings`: of the result itself, in its own precision.
inline void compare(const Case& c, const Operands& o, const Results& r, double unit, double roundings) {
  const auto close = [&](const Buffer& results, int64_t i, const Term& expected, double steps) {
    const double epsilon = results.epsilon();
    CHECK_CLOSE(
        results[i], expected.value,
        expected.size * unit * steps + std::abs(expected.value) * epsilon * roundings + 1e-7 * (epsilon > 1e-5));
  };
  const auto relu = [](double x) { return x > 0 ? x : 0.0; };
  const int64_t N = c.N, D = c.D, C = c.C();
  std::vector<Term> dweight_q(C), dweight_k(C);
  for (int64_t b = 0; b < c.B; ++b) {
    const auto at = [&](const Buffer& t, int64_t n, int64_t i) { return t[(b * N + n) * c.pitch() + i]; };
    std::vector<double> rstd_q(N, 1.0), rstd_k(N, 1.0), wq(C, 1.0), wk(C, 1.0), qhat(N * C), khat(N * C);
    std::vector<Term> dkhat(N * C), du(N * C), sum_b(N);
    for (int64_t i = 0; i < C && c.norms; ++i) wq[i] = o.weight_q[i], wk[i] = o.weight_k[i];
    for (int64_t n = 0; n < N; ++n) {
      double qq = 0, kk = 0;
      for (int64_t i = 0; i < C; ++i) qq += at(o.q, n, i) * at(o.q, n, i), kk += at(o.k, n, i) * at(o.k, n, i);
      if (c.norms) rstd_q[n] = 1 / std::sqrt(qq / C + kNormEps), rstd_k[n] = 1 / std::sqrt(kk / C + kNormEps);
      for (int64_t i = 0; i < C; ++i) {
        qhat[n * C + i] = relu(at(o.q, n, i) * wq[i]);  // u of the formulas: without the row scale
        khat[n * C + i] = relu(at(o.k, n, i) * wk[i] * rstd_k[n]);
      }
    }
    for (int64_t h = 0; h < c.H; ++h) {
      std::vector<double> z(D);
      std::vector<Term> S(D * D), dS(D * D), dz(D);
      for (int64_t n = 0; n < N; ++n)
        for (int64_t d = 0; d < D; ++d) {
          z[d] += khat[n * C + h * D + d];
          for (int64_t e = 0; e < D; ++e) S[d * D + e].add(khat[n * C + h * D + d] * at(o.v, n, h * D + e));
        }
      for (int64_t d = 0; d < D; ++d) {
        const int64_t row = ((b * c.H + h) * (D + 1) + d) * D;
        for (int64_t e = 0; e < D; ++e) close(r.state, row + e, S[d * D + e], 1);
        close(r.state, row + (D - d) * D + d, Term{z[d], z[d]}, 1);
      }
      for (int64_t n = 0; n < N; ++n) {
        const double* u = &qhat[n * C + h * D];
        double denominator = c.norms && !c.has_rstd_q() ? 0.0 : c.eps / rstd_q[n];
        for (int64_t d = 0; d < D; ++d) denominator += u[d] * z[d];
        const double inverse = denominator > 0 ? 1 / denominator : 0.0;
        std::vector<Term> t(D);
        Term beta;
        for (int64_t e = 0; e < D; ++e) {
          Term out;
          for (int64_t d = 0; d < D; ++d) {
            out.add(u[d] * S[d * D + e].value * inverse, u[d] * S[d * D + e].size * inverse);
            const double g = at(o.dout, n, h * D + e);
            t[d].add(S[d * D + e].value * g, S[d * D + e].size * std::abs(g));
          }
          close(r.out, (b * N + n) * C + h * D + e, out, 4);
        }
        for (int64_t d = 0; d < D; ++d)
          beta.add(-u[d] * t[d].value * inverse * inverse, u[d] * t[d].size * inverse * inverse);
        sum_b[n].add(beta.value, beta.size);
        for (int64_t d = 0; d < D; ++d) {
          if (u[d] > 0) {
            Term& g = du[n * C + h * D + d];
            g.add(t[d].value * inverse + beta.value * z[d], t[d].size * inverse + beta.size * z[d]);
          }
          dz[d].add(beta.value * u[d], beta.size * u[d]);
          for (int64_t e = 0; e < D; ++e) dS[d * D + e].add(u[d] * at(o.dout, n, h * D + e) * inverse);
        }
      }
      for (int64_t n = 0; n < N; ++n)
        for (int64_t e = 0; e < D; ++e) {
          Term dv;
          Term& g = dkhat[n * C + h * D + e];
          if (khat[n * C + h * D + e] > 0) g.add(dz[e].value, dz[e].size);
          for (int64_t d = 0; d < D; ++d) {
            dv.add(dS[d * D + e].value * khat[n * C + h * D + d], dS[d * D + e].size * khat[n * C + h * D + d]);
            if (khat[n * C + h * D + e] <= 0) continue;
            const double v = at(o.v, n, h * D + d);
            g.add(dS[e * D + d].value * v, dS[e * D + d].size * std::abs(v));
          }
          close(r.dv, (b * N + n) * C + h * D + e, dv, 4);
        }
    }
    for (int64_t n = 0; n < N; ++n) {
      Term row;  // sum over all channels of weight_k dkhat k
      for (int64_t i = 0; i < C; ++i) {
        const Term& g = dkhat[n * C + i];
        row.add(wk[i] * g.value * at(o.k, n, i), std::abs(wk[i] * at(o.k, n, i)) * g.size);
      }
      for (int64_t i = 0; i < C; ++i) {
        const Term &g = dkhat[n * C + i], &f = du[n * C + i];
        const double k = at(o.k, n, i), q = at(o.q, n, i), rk = rstd_k[n];
        Term dq, dk;
        dq.add(wq[i] * f.value, std::abs(wq[i]) * f.size);
        const double scale = q * c.eps * rstd_q[n] / C;
        if (c.has_rstd_q()) dq.add(scale * sum_b[n].value, std::abs(scale) * sum_b[n].size);
        dk.add(rk * wk[i] * g.value, std::abs(rk * wk[i]) * g.size);
        if (c.norms) dk.add(-k * rk * rk * rk / C * row.value, std::abs(k) * rk * rk * rk / C * row.size);
        close(r.dq, (b * N + n) * C + i, dq, 8);
        close(r.dk, (b * N + n) * C + i, dk, 8);
        dweight_q[i].add(q * f.value, std::abs(q) * f.size);
        dweight_k[i].add(rk * k * g.value, std::abs(rk * k) * g.size);
      }
    }
  }
  for (int64_t i = 0; i < C && c.norms; ++i) {
    close(r.dweight_q, i, dweight_q[i], 8);
    close(r.dweight_k, i, dweight_k[i], 8);
  }
}

}  // namespace sana_ext::test
