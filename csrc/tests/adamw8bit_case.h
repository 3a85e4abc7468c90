// Parameters with 8-bit and fp32 states, and one AdamW step of them in double from the same bytes.
#pragma once
#include "../common/code8.h"
#include "check_test.h"

namespace sana_ext::test {

constexpr DynamicCode kSignedCode = make_dynamic_code(true), kUnsignedCode = make_dynamic_code(false);
constexpr int64_t kStateBlock = 256;

struct AdamParameter {
  AdamParameter(int64_t n_, Dtype p_dtype, Dtype g_dtype, bool quantised_, Random& random)
      : n(n_),
        quantised(quantised_),
        p(p_dtype, n, random),
        g(g_dtype, n, random),
        codes1(quantised ? n : 0),
        codes2(codes1.size()),
        m(Dtype::kFloat32, quantised ? 0 : n),
        v(Dtype::kFloat32, m.count()),
        absmax1(Dtype::kFloat32, quantised ? blocks() : 0),
        absmax2(Dtype::kFloat32, absmax1.count()) {
    for (auto& code : codes1) code = static_cast<uint8_t>(random.bits() >> 24);
    for (auto& code : codes2) code = static_cast<uint8_t>(random.bits() >> 24);
    for (int64_t i = 0; i < m.count(); ++i) m.set(i, random()), v.set(i, random() + 2.0);
    for (int64_t i = 0; i < absmax1.count(); ++i) absmax1.set(i, random() + 2.0), absmax2.set(i, random() + 2.0);
  }
  int64_t blocks() const { return (n + kStateBlock - 1) / kStateBlock; }
  double first(int64_t i) const {
    return quantised ? decode_signed(kSignedCode, codes1[i]) * absmax1[i / kStateBlock] : m[i];
  }
  double second(int64_t i) const {
    const uint8_t code = quantised && codes2[i] == 0 && first(i) != 0 ? 1 : quantised ? codes2[i] : 0;
    return quantised ? decode_unsigned(kUnsignedCode, code) * absmax2[i / kStateBlock] : v[i];
  }
  void* state1() { return quantised ? static_cast<void*>(codes1.data()) : m.data(); }
  void* state2() { return quantised ? static_cast<void*>(codes2.data()) : v.data(); }

  int64_t n;
  bool quantised;
  Buffer p, g;
  std::vector<uint8_t> codes1, codes2;
  Buffer m, v, absmax1, absmax2;
};

struct AdamNumbers {
  double beta1 = 0.9, rest1 = 0.1, beta2 = 0.99, rest2 = 0.01, size = 0.02, root = 1.5, eps = 1e-3, keep = 0.99,
         factor = 0.5;
};

// `after` must be `before` one step later. A byte may be the neighbour of the nearest one, where a value lies next to a
// border.
inline void check_step(const AdamParameter& before, const AdamParameter& after, const AdamNumbers& h) {
  for (int64_t block = 0; block < before.blocks(); ++block) {
    const int64_t begin = block * kStateBlock, end = begin + kStateBlock < before.n ? begin + kStateBlock : before.n;
    double top1 = 0, top2 = 0;
    std::vector<double> m, v;
    for (int64_t i = begin; i < end; ++i) {
      const double g = before.g[i] * h.factor;
      m.push_back(before.first(i) * h.beta1 + g * h.rest1), v.push_back(before.second(i) * h.beta2 + g * g * h.rest2);
      top1 = std::fmax(top1, std::abs(m.back())), top2 = std::fmax(top2, v.back());
      const double expected = before.p[i] * h.keep - h.size * m.back() / (std::sqrt(v.back()) * h.root + h.eps);
      CHECK_CLOSE(after.p[i], expected, 4e-6 + 1.01 * before.p.epsilon() * std::abs(expected));
    }
    if (!before.quantised) {
      for (int64_t i = begin; i < end; ++i) {
        CHECK_CLOSE(after.m[i], m[i - begin], 1e-6);
        CHECK_CLOSE(after.v[i], v[i - begin], 1e-6);
      }
      continue;
    }
    CHECK_CLOSE(after.absmax1[block], top1, 1e-6 * top1);
    CHECK_CLOSE(after.absmax2[block], top2, 1e-6 * top2);
    for (int64_t i = begin; i < end; ++i) {
      const float x = static_cast<float>(m[i - begin] / top1), y = static_cast<float>(v[i - begin] / top2);
      CHECK(std::abs(after.codes1[i] - encode_signed(kSignedCode, x)) <= 1);
      CHECK(std::abs(after.codes2[i] - encode_unsigned(kUnsignedCode, y, 1.0f)) <= 1);
      CHECK((after.codes2[i] == 0) == (v[i - begin] == 0));
      // To half the distance of two values in the top decade, and a little.
      CHECK_CLOSE(after.first(i), m[i - begin], 0.0071 * top1);
      CHECK_CLOSE(after.second(i), v[i - begin], 0.0036 * top2);
    }
  }
}

inline std::vector<AdamParameter> adam_parameters(Dtype p, Dtype g, Random& random) {
  std::vector<AdamParameter> list;
  for (const int64_t n : {256, 1000, 1, 255, 3000, 31})
    for (const bool quantised : {true, false}) list.emplace_back(n, p, g, quantised, random);
  return list;
}

inline bool same(const AdamParameter& a, const AdamParameter& b) {
  return same(a.p, b.p) && a.codes1 == b.codes1 && a.codes2 == b.codes2 && same(a.m, b.m) && same(a.v, b.v) &&
         same(a.absmax1, b.absmax1) && same(a.absmax2, b.absmax2);
}

}  // namespace sana_ext::test
