// One case of dwconv_glu, its operands and results, and the formulas in double: shared by the tests of the CPU kernels
// and of the emulated CUDA kernels.
#pragma once
#include "check_test.h"

namespace sana_ext::test {

struct Case {
  int64_t B, H, W, F;
  Dtype dtype, weights;
  bool bias;
  int64_t gap = 5;             // elements between the rows of u
  double sigmoid_error = 0.0;  // absolute error that the kernel's sigmoid may have
  int64_t N() const { return H * W; }
  int64_t pitch() const { return 2 * F + gap; }
};

struct Operands {
  Buffer u, weight, bias, dout;
  Operands(const Case& c, Random& r)
      : u(c.dtype, c.B * c.N() * c.pitch(), r),
        weight(c.weights, 2 * c.F * 9, r),
        bias(c.weights, 2 * c.F, r),
        dout(c.dtype, c.B * c.N() * c.F, r) {}
};

struct Results {
  Buffer out, du, dweight, dbias;
  explicit Results(const Case& c)
      : out(c.dtype, c.B * c.N() * c.F),
        du(c.dtype, c.B * c.N() * 2 * c.F),
        dweight(c.weights, 2 * c.F * 9),
        dbias(c.weights, 2 * c.F) {}
};

inline double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

// Each array of values has one of the errors that an error of the sigmoid may lead to.
inline void compare(const Case& c, const Operands& o, const Results& r) {
  const double acc = c.dtype == Dtype::kFloat64 ? 0x1p-53 : 0x1p-24, N = static_cast<double>(c.B * c.N());
  const double e = c.sigmoid_error;
  const auto close = [](const Buffer& got, int64_t i, double expected, double rounding) {
    CHECK_CLOSE(got[i], expected, std::abs(expected) * got.epsilon() + rounding + 1e-7 * (got.epsilon() > 1e-5));
  };
  const int64_t channels = 2 * c.F;
  std::vector<double> conv(c.N() * channels), dconv(c.N() * channels), dweight(channels * 9), dbias(channels);
  std::vector<double> conv_error(conv.size()), dconv_error(conv.size()), dweight_error(dweight.size()),
      dbias_error(dbias.size());
  for (int64_t b = 0; b < c.B; ++b) {
    const auto u = [&](int64_t y, int64_t x, int64_t ch) { return o.u[(b * c.N() + y * c.W + x) * c.pitch() + ch]; };
    // body(pixel, channel, neighbour's row, neighbour's column, tap)
    const auto for_each_tap = [&](const auto& body) {
      for (int64_t n = 0; n < c.N(); ++n)
        for (int64_t tap = 0; tap < 9; ++tap) {
          const int64_t y = n / c.W + tap / 3 - 1, x = n % c.W + tap % 3 - 1;
          if (y < 0 || y >= c.H || x < 0 || x >= c.W) continue;
          for (int64_t ch = 0; ch < channels; ++ch) body(n, ch, y, x, tap);
        }
    };
    for (int64_t i = 0; i < c.N() * channels; ++i) conv[i] = c.bias ? o.bias[i % channels] : 0.0, conv_error[i] = 0.0;
    for_each_tap([&](int64_t n, int64_t ch, int64_t y, int64_t x, int64_t tap) {
      const double w = o.weight[ch * 9 + tap], value = u(y, x, ch);
      conv[n * channels + ch] += w * value * sigmoid(value);
      conv_error[n * channels + ch] += std::abs(w * value) * e;
    });
    for (int64_t n = 0; n < c.N(); ++n)
      for (int64_t ch = 0; ch < c.F; ++ch) {
        const int64_t i_a = n * channels + ch, i_g = i_a + c.F;
        const double a = conv[i_a], g = conv[i_g], sigma = sigmoid(g), slope = sigma * (1 + g * (1 - sigma));
        const double dout = o.dout[(b * c.N() + n) * c.F + ch];
        const double silu_error = 1.1 * conv_error[i_g] + std::abs(g) * e;
        const double slope_error = 0.5 * conv_error[i_g] + (1 + 2 * std::abs(g)) * e;
        close(r.out, (b * c.N() + n) * c.F + ch, a * g * sigma,
              4000 * acc + 1.01 * (std::abs(g * sigma) * conv_error[i_a] + std::abs(a) * silu_error));
        dconv[i_a] = dout * g * sigma;
        dconv_error[i_a] = std::abs(dout) * silu_error;
        dconv[i_g] = dout * a * slope;
        dconv_error[i_g] = std::abs(dout) * (1.1 * conv_error[i_a] + std::abs(a) * slope_error);
      }
    std::vector<double> ds(c.N() * channels), ds_error(ds.size());
    for_each_tap([&](int64_t n, int64_t ch, int64_t y, int64_t x, int64_t tap) {
      const int64_t i = n * channels + ch, at = (y * c.W + x) * channels + ch;
      const double w = o.weight[ch * 9 + tap], value = u(y, x, ch), s = value * sigmoid(value);
      ds[at] += w * dconv[i];
      ds_error[at] += std::abs(w) * dconv_error[i];
      dweight[ch * 9 + tap] += dconv[i] * s;
      dweight_error[ch * 9 + tap] += dconv_error[i] * std::abs(s) + std::abs(dconv[i] * value) * e;
    });
    for (int64_t n = 0; n < c.N(); ++n)
      for (int64_t ch = 0; ch < channels; ++ch) {
        const int64_t i = n * channels + ch;
        const double value = u(n / c.W, n % c.W, ch), sigma = sigmoid(value);
        close(r.du, (b * c.N() + n) * channels + ch, ds[i] * sigma * (1 + value * (1 - sigma)),
              20000 * acc + 1.1 * ds_error[i] + std::abs(ds[i]) * (1 + 2 * std::abs(value)) * e);
        dbias[ch] += dconv[i], dbias_error[ch] += dconv_error[i];
      }
  }
  for (int64_t i = 0; i < channels * 9; ++i) close(r.dweight, i, dweight[i], 2000 * N * acc + 1.01 * dweight_error[i]);
  for (int64_t i = 0; c.bias && i < channels; ++i) close(r.dbias, i, dbias[i], 2000 * N * acc + 1.01 * dbias_error[i]);
}

}  // namespace sana_ext::test
