// The product for a few rows against sums in double, for every row count that has a tile of its own and its remainders.
#include "../cpu/kernels/linear.h"

#include <cstring>

#include "check_test.h"

namespace sana_ext::test {
namespace {

void product(Dtype dtype, int64_t M, int64_t K, int64_t F, bool with_bias, Random& random) {
  const bool fp64 = dtype == Dtype::kFloat64;
  const Dtype acc = fp64 ? Dtype::kFloat64 : Dtype::kFloat32;
  const int64_t stride = K + 3, items = (F + cpu::kLinearBlock - 1) / cpu::kLinearBlock;
  Buffer x(acc, M * K, random), bias(acc, F, random), y(dtype, M * F), again(dtype, M * F);
  const Buffer weight(dtype, (F - 1) * stride + K, random);
  cpu::LinearFewRows a{M, K, F, x.data(), weight, stride, with_bias ? bias.data() : nullptr, y, fp64};
  cpu::linear_few_rows(a, 0, items);
  a.y = again;
  for (int64_t item = items; item-- > 0;) cpu::linear_few_rows(a, item, item + 1);
  CHECK(std::memcmp(ConstPtr(y).data, ConstPtr(again).data, M * F * size_of(dtype)) == 0);
  for (int64_t m = 0; m < M; ++m) {
    for (int64_t f = 0; f < F; ++f) {
      double expected = with_bias ? bias[f] : 0.0, size = std::abs(expected);
      for (int64_t k = 0; k < K; ++k) {
        const double term = x[m * K + k] * weight[f * stride + k];
        expected += term, size += std::abs(term);
      }
      const double subnormal = dtype == Dtype::kFloat16 ? 0x1p-25 : 0.0;  // half of float16's smallest step
      const double rounding = (fp64 ? 0x1p-53 : 0x1p-24) * static_cast<double>(K + 2) * size + subnormal;
      CHECK_CLOSE(y[m * F + f], expected, std::abs(expected) * y.epsilon() + rounding);
    }
  }
}

void tests() {
  Random random(1);
  for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16})
    for (const int64_t M : {1, 2, 3, 4, 5, 7, 16})
      for (const int64_t K : {1, 5, 16, 35, 100})
        for (const int64_t F : {1, 2, 3, 8, 13, 20}) product(dtype, M, K, F, (M + F) % 2 == 0, random);
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
