// Parameters of CAME with 8-bit and fp32 moments, and one step of them in double from the same bytes.
#pragma once
#include "../common/code8.h"
#include "check_test.h"

namespace sana_ext::test {

constexpr DynamicCode kCameCode = make_dynamic_code(true);

struct CameNumbers {
  double lr = 0.01, weight_decay = 0.1, beta1 = 0.9, beta2 = 0.99, beta3 = 0.95, eps1 = 1e-30, eps2 = 1e-16, clip = 0.5,
         factor = 0.5, correct1 = 1.5, correct2 = 2.0, correct3 = 1.25;
};

struct CameShape {
  int64_t B, R, C;
  bool factored;
  int64_t block;  // of the optimizer's option
};

// One row, one column, primes, rows of several blocks and strips, rows that share a block, batches, runs, nothing.
inline std::vector<CameShape> came_shapes() {
  return {{1, 1, 1, true, 2048},  {1, 1, 300, true, 256},  {1, 67, 1, true, 256},   {1, 131, 37, true, 2048},
          {1, 9, 97, true, 64},   {1, 5, 1120, true, 256}, {1, 3, 801, true, 256},  {2, 7, 264, true, 2048},
          {3, 130, 5, true, 256}, {1, 1, 0, false, 256},   {1, 0, 40, true, 2048},  {1, 300, 9, false, 256},
          {1, 700, 1, false, 64}, {1, 4, 350, false, 128}, {1, 140, 256, true, 256}};
}

// How rows are cut into blocks: the rule of sana_ext/reference/came8bit.py.
struct CameBlocks {
  explicit CameBlocks(const CameShape& s) {
    const int64_t least = s.block < 64 ? s.block : 64;
    while (s.C > 0 && unit_rows * s.C < least && unit_rows < s.R) unit_rows *= 2;
    unit_rows = s.R > 0 && unit_rows > s.R ? s.R : unit_rows;
    const int64_t pieces = s.C / s.block > 1 ? s.C / s.block : 1;
    length = (s.C + pieces - 1) / pieces;
    blocks = s.C > 0 ? (s.C + length - 1) / length : 1;
    units = (s.R + unit_rows - 1) / unit_rows;
  }
  int64_t of(int64_t b, int64_t r, int64_t c) const { return (b * units + r / unit_rows) * blocks + c / length; }
  int64_t unit_rows = 1, length, blocks, units;
};

struct CameParameter {
  CameParameter(const CameShape& shape_, Dtype p_dtype, Dtype g_dtype, bool quantised_, bool linear_, Random& random)
      : shape(shape_),
        cut(shape_),
        quantised(quantised_),
        linear(linear_),
        n(shape.B * shape.R * shape.C),
        p(p_dtype, n, random),
        g(g_dtype, n, random),
        codes(quantised ? n : 0),
        scales(Dtype::kFloat32, quantised ? shape.B * cut.units * cut.blocks * (linear ? 2 : 1) : 0),
        m(Dtype::kFloat32, quantised ? 0 : n, random),
        second(Dtype::kFloat32, shape.factored ? shape.B * shape.R : n),
        col(Dtype::kFloat32, shape.factored ? shape.B * shape.C : 0),
        res_row(Dtype::kFloat32, shape.factored ? shape.B * shape.R : 0),
        res_col(Dtype::kFloat32, col.count()),
        work(Dtype::kFloat32, 1 + (shape.factored ? 2 * shape.B * (1 + shape.C + shape.R) : 0)) {
    for (auto& code : codes) code = static_cast<uint8_t>(random.bits() >> 24);
    for (int64_t i = 0; i < scales.count(); ++i)
      scales.set(i, !linear ? random() + 2.5 : i % 2 == 0 ? random() : (random() + 2.5) * 0.01);
    for (Buffer* b : {&second, &col, &res_row, &res_col})
      for (int64_t i = 0; i < b->count(); ++i) b->set(i, random() + 2.5);
  }
  double moment(int64_t i) const {
    if (!quantised) return m[i];
    const int64_t at = cut.of(i / shape.C / shape.R, i / shape.C % shape.R, i % shape.C);
    return linear ? codes[i] * scales[2 * at + 1] + scales[2 * at] : decode_signed(kCameCode, codes[i]) * scales[at];
  }

  CameShape shape;
  CameBlocks cut;
  bool quantised, linear;
  int64_t n;
  Buffer p, g;
  std::vector<uint8_t> codes;
  Buffer scales, m, second, col, res_row, res_col, work;
};

inline std::vector<CameParameter> came_parameters(Dtype p, Dtype g, Random& random) {
  std::vector<CameParameter> list;
  for (const CameShape& shape : came_shapes())
    for (int kind = 0; kind < 3; ++kind) list.emplace_back(shape, p, g, kind > 0, kind == 2, random);
  return list;
}

inline bool same(const CameParameter& a, const CameParameter& b) {
  return same(a.p, b.p) && a.codes == b.codes && same(a.scales, b.scales) && same(a.m, b.m) &&
         same(a.second, b.second) && same(a.col, b.col) && same(a.res_row, b.res_row) && same(a.res_col, b.res_col);
}

// What a step makes of x's averages along one axis: `next` from `old` and sums of this step, and their weights.
inline void close_to(const Buffer& got, const std::vector<double>& expected) {
  for (int64_t i = 0; i < got.count(); ++i) CHECK_CLOSE(got[i], expected[i], 1e-5 * expected[i]);
}

// `after` must be `before` one step later.
inline void check_came(const CameParameter& before, const CameParameter& after, const CameNumbers& h) {
  const int64_t B = before.shape.B, R = before.shape.R, C = before.shape.C;
  const bool factored = before.shape.factored;
  const int64_t n = before.n;
  if (n == 0) return;
  std::vector<double> u(n), m(n), next_row(B * R), next_col(B * C), mean(B);
  // x -> averages of its squares over rows and columns, into next_* and as weights of each value.
  const auto average = [&](const std::vector<double>& x, const Buffer& row, const Buffer& col, double beta,
                           double eps) {
    for (auto* v : {&next_row, &next_col, &mean})
      for (double& e : *v) e = 0;
    for (int64_t i = 0; i < n; ++i) {
      next_row[i / C] += x[i] * x[i] / double(C);
      next_col[i / C / R * C + i % C] += x[i] * x[i] / double(R);
    }
    for (int64_t i = 0; i < B * R; ++i) {
      next_row[i] = row[i] * beta + (next_row[i] + eps) * (1 - beta);
      mean[i / R] += next_row[i] / double(R);
    }
    for (int64_t i = 0; i < B * C; ++i) next_col[i] = col[i] * beta + (next_col[i] + eps) * (1 - beta);
  };
  const auto weight = [&](int64_t i, double correct) {
    return 1 / std::sqrt(next_row[i / C] / mean[i / C / R]) / std::sqrt(next_col[i / C / R * C + i % C] * correct);
  };
  std::vector<double> g(n), v(n);
  for (int64_t i = 0; i < n; ++i) g[i] = before.g[i] * h.factor;
  double squares = 0;
  if (factored) average(g, before.second, before.col, h.beta2, h.eps1);
  for (int64_t i = 0; i < n; ++i) {
    if (!factored) v[i] = before.second[i] * h.beta2 + (g[i] * g[i] + h.eps1) * (1 - h.beta2);
    u[i] = g[i] * (factored ? weight(i, h.correct2) : 1 / std::sqrt(v[i] * h.correct2));
    squares += u[i] * u[i];
  }
  close_to(after.second, factored ? next_row : v);
  if (factored) close_to(after.col, next_col);
  const double rms = std::sqrt(squares / double(n)) / h.clip;
  std::vector<double> residual(n);
  for (int64_t i = 0; i < n; ++i) {
    u[i] /= rms > 1 ? rms : 1;
    m[i] = before.moment(i) * h.beta1 + u[i] * (1 - h.beta1);
    residual[i] = u[i] - m[i];
  }
  if (factored) {
    average(residual, before.res_row, before.res_col, h.beta3, h.eps2);
    close_to(after.res_row, next_row);
    close_to(after.res_col, next_col);
  }
  for (int64_t i = 0; i < n; ++i) {
    const double step = h.lr * h.correct1 * m[i] * (factored ? weight(i, h.correct3) : 1);
    const double expected = before.p[i] * (1 - h.lr * h.weight_decay) - step;
    CHECK_CLOSE(after.p[i], expected, 4e-6 + 1.01 * before.p.epsilon() * std::abs(expected));
  }
  if (!before.quantised) {
    for (int64_t i = 0; i < n; ++i) CHECK_CLOSE(after.m[i], m[i], 4e-6);
    return;
  }
  const int64_t blocks = B * before.cut.units * before.cut.blocks;
  std::vector<double> low(blocks, HUGE_VAL), high(blocks, -HUGE_VAL);
  const auto block_of = [&](int64_t i) { return before.cut.of(i / C / R, i / C % R, i % C); };
  for (int64_t i = 0; i < n; ++i) {
    double &l = low[block_of(i)], &t = high[block_of(i)];
    l = std::fmin(l, m[i]), t = std::fmax(t, m[i]);
  }
  for (int64_t i = 0; i < blocks; ++i) {
    const double top = std::fmax(-low[i], high[i]);
    if (before.linear) {
      // Where 0 lies between the ends it is one of the values: the lowest is then a whole number of steps away.
      const bool crosses = low[i] < 0 && high[i] > 0;
      const double lowest = after.scales[2 * i], step = after.scales[2 * i + 1];
      CHECK_CLOSE(step, (high[i] - low[i]) / (crosses ? 254 : 255), 4e-6 * top);
      CHECK_CLOSE(lowest, low[i], (crosses ? 0.5 * step : 0) + 4e-6 * top);
      if (crosses) CHECK_CLOSE(lowest, std::rint(lowest / step) * step, 1e-6 * top);
    } else {
      CHECK_CLOSE(after.scales[i], top, 4e-6 * top);
    }
  }
  // To half the distance of two values, in the dynamic code's top decade, and a little.
  for (int64_t i = 0; i < n; ++i) {
    const double l = low[block_of(i)], t = high[block_of(i)], top = std::fmax(-l, t);
    CHECK_CLOSE(after.moment(i), m[i], before.linear ? (t - l) / 254 * 0.501 + 4e-6 * top : 0.0071 * top);
  }
}

}  // namespace sana_ext::test
