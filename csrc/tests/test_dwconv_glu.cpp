// dwconv_glu's kernels without torch: against the formulas in double, every dtype, odd sizes, strides, no bias, and the
// same bits however the work is cut.
#include "../cpu/kernels/dwconv_glu.h"

#include "check_test.h"

namespace sana_ext::test {
namespace {

struct Case {
  int64_t B, H, W, F;
  Dtype dtype, weights;
  bool bias;
  int64_t N() const { return H * W; }
  int64_t pitch() const { return 2 * F + 5; }  // rows with a gap
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

double sigmoid(double x) { return 1 / (1 + std::exp(-x)); }

void compare(const Case& c, const Operands& o, const Results& r) {
  const double acc = c.dtype == Dtype::kFloat64 ? 0x1p-53 : 0x1p-24, N = static_cast<double>(c.B * c.N());
  const auto close = [](const Buffer& got, int64_t i, double expected, double rounding) {
    CHECK_CLOSE(got[i], expected, std::abs(expected) * got.epsilon() + rounding + 1e-7 * (got.epsilon() > 1e-5));
  };
  const int64_t channels = 2 * c.F;
  std::vector<double> conv(c.N() * channels), dconv(c.N() * channels), dweight(channels * 9), dbias(channels);
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
    for (int64_t i = 0; i < c.N() * channels; ++i) conv[i] = c.bias ? o.bias[i % channels] : 0.0;
    for_each_tap([&](int64_t n, int64_t ch, int64_t y, int64_t x, int64_t tap) {
      conv[n * channels + ch] += o.weight[ch * 9 + tap] * u(y, x, ch) * sigmoid(u(y, x, ch));
    });
    for (int64_t n = 0; n < c.N(); ++n)
      for (int64_t ch = 0; ch < c.F; ++ch) {
        const double a = conv[n * channels + ch], g = conv[n * channels + c.F + ch], sigma = sigmoid(g);
        const double dout = o.dout[(b * c.N() + n) * c.F + ch];
        close(r.out, (b * c.N() + n) * c.F + ch, a * g * sigma, 4000 * acc);
        dconv[n * channels + ch] = dout * g * sigma;
        dconv[n * channels + c.F + ch] = dout * a * sigma * (1 + g * (1 - sigma));
      }
    std::vector<double> ds(c.N() * channels);
    for_each_tap([&](int64_t n, int64_t ch, int64_t y, int64_t x, int64_t tap) {
      const double d = dconv[n * channels + ch];
      ds[(y * c.W + x) * channels + ch] += o.weight[ch * 9 + tap] * d;
      dweight[ch * 9 + tap] += d * u(y, x, ch) * sigmoid(u(y, x, ch));
    });
    for (int64_t n = 0; n < c.N(); ++n)
      for (int64_t ch = 0; ch < channels; ++ch) {
        const double value = u(n / c.W, n % c.W, ch), sigma = sigmoid(value);
        close(r.du, (b * c.N() + n) * channels + ch, ds[n * channels + ch] * sigma * (1 + value * (1 - sigma)),
              20000 * acc);
        dbias[ch] += dconv[n * channels + ch];
      }
  }
  for (int64_t i = 0; i < channels * 9; ++i) close(r.dweight, i, dweight[i], 2000 * N * acc);
  for (int64_t i = 0; c.bias && i < channels; ++i) close(r.dbias, i, dbias[i], 2000 * N * acc);
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
