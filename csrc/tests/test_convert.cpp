// The row conversions, bit by bit against the scalar conversions of common/math.h (which test_math.cpp holds against
// the definition of the formats): every 16-bit code, hostile floats, whole vectors and tails.
#include "../cpu/kernels/convert.h"

#include <cstring>

#include "../cpu/kernels/norm_modulate.h"
#include "check_test.h"

namespace sana_ext::test {
namespace {

constexpr Dtype kLow[] = {Dtype::kBFloat16, Dtype::kFloat16};
// One long row; vectors and a tail; tails only. In all cases source and target have gaps between rows.
constexpr int64_t kWidths[] = {8192, 37, 3};

float widen(Dtype dtype, uint16_t bits) {
  return dtype == Dtype::kBFloat16 ? bfloat16_to_float(bits) : half_to_float(bits);
}
uint16_t round_to(Dtype dtype, float value) {
  return dtype == Dtype::kBFloat16 ? float_to_bfloat16(value) : float_to_half(value);
}

// Equal bits; any NaN of the same sign will do for a NaN.
bool same(float got, float expected) {
  return float_bits(got) == float_bits(expected) ||
         (std::isnan(got) && std::isnan(expected) && std::signbit(got) == std::signbit(expected));
}
bool same(Dtype dtype, uint16_t got, uint16_t expected) {
  return got == expected ||
         (std::isnan(widen(dtype, got)) && std::isnan(widen(dtype, expected)) && (got ^ expected) < 0x8000);
}

// Converts `values`, laid out in rows of `cols` with gaps, in two pieces; returns the results without the gaps.
template <class S, class T>
std::vector<T> converted(const std::vector<S>& values, Dtype from, Dtype to, int64_t cols, const void* addend) {
  const int64_t count = static_cast<int64_t>(values.size()), rows = (count + cols - 1) / cols;
  std::vector<S> source((rows - 1) * (cols + 5) + cols);
  std::vector<T> target((rows - 1) * (cols + 3) + cols, T(77));
  for (int64_t i = 0; i < count; ++i) source[i / cols * (cols + 5) + i % cols] = values[i];
  const cpu::Convert a{rows, cols, {source.data(), from}, cols + 5, addend, 0, {target.data(), to}, cols + 3};
  cpu::convert(a, 0, rows / 2);
  cpu::convert(a, rows / 2, rows);
  for (int64_t r = 0; r + 1 < rows; ++r)
    for (int64_t i = cols; i < cols + 3; ++i) CHECK(target[r * (cols + 3) + i] == T(77));
  std::vector<T> result(count);
  for (int64_t i = 0; i < count; ++i) result[i] = target[i / cols * (cols + 3) + i % cols];
  return result;
}

// All kinds of floats: for every 16-bit code of both formats its value, the middle to the next one and both neighbours
// of that middle; random bit patterns, which include NaNs and subnormals; the extremes.
std::vector<float> hostile_floats() {
  std::vector<float> values = {0.0f,
                               -0.0f,
                               HUGE_VALF,
                               -HUGE_VALF,
                               NAN,
                               -NAN,
                               bits_float(1),
                               bits_float(0x807fffff),
                               bits_float(0x7f7fffff),
                               bits_float(0x7f800001),
                               bits_float(0xffffffff),
                               65504.0f,
                               65519.99f,
                               65520.0f,
                               0x1p-24f,
                               0x1p-25f,
                               0x1.000002p-25f,
                               0x1p-149f};
  for (const Dtype dtype : kLow) {
    for (uint32_t code = 0; code < 0x10000; ++code) {
      const float value = widen(dtype, static_cast<uint16_t>(code));
      const float next = widen(dtype, static_cast<uint16_t>(code + 1));
      const float middle = value + (next - value) / 2;
      values.insert(values.end(), {value, middle, std::nextafter(middle, value), std::nextafter(middle, next)});
    }
  }
  Random random(3);
  for (int i = 0; i < 1 << 18; ++i) values.push_back(bits_float(random.bits()));
  return values;
}

void every_code() {
  std::vector<uint16_t> codes(0x10000);
  for (uint32_t i = 0; i < 0x10000; ++i) codes[i] = static_cast<uint16_t>(i);
  for (const Dtype dtype : kLow) {
    for (const int64_t cols : kWidths) {
      const auto wide = converted<uint16_t, float>(codes, dtype, Dtype::kFloat32, cols, nullptr);
      for (size_t i = 0; i < codes.size(); ++i) CHECK(same(wide[i], widen(dtype, codes[i])));
    }
  }
}

void every_rounding() {
  const std::vector<float> values = hostile_floats();
  for (const Dtype dtype : kLow) {
    for (const int64_t cols : kWidths) {
      const auto low = converted<float, uint16_t>(values, Dtype::kFloat32, dtype, cols, nullptr);
      for (size_t i = 0; i < values.size(); ++i) CHECK(same(dtype, low[i], round_to(dtype, values[i])));
    }
  }
  const auto copy = converted<float, float>(values, Dtype::kFloat32, Dtype::kFloat32, 37, nullptr);
  for (size_t i = 0; i < values.size(); ++i) CHECK(same(copy[i], values[i]));
}

// The bias is added before the one rounding; an addend with rows may be the target itself.
void addends() {
  Random random(5);
  const int64_t cols = 37, rows = 20;
  std::vector<float> values(rows * cols), bias(cols);
  for (float& v : values) v = random();
  for (float& b : bias) b = random();
  for (const Dtype dtype : kLow) {
    const auto low = converted<float, uint16_t>(values, Dtype::kFloat32, dtype, cols, bias.data());
    for (int64_t i = 0; i < rows * cols; ++i) CHECK(low[i] == round_to(dtype, values[i] + bias[i % cols]));
  }
  std::vector<double> sum(rows * cols, 1.0), wide(values.begin(), values.end());
  cpu::convert(
      {rows, cols, {wide.data(), Dtype::kFloat64}, cols, sum.data(), cols, {sum.data(), Dtype::kFloat64}, cols}, 0,
      rows);
  for (int64_t i = 0; i < rows * cols; ++i) CHECK(sum[i] == 1.0 + wide[i]);
}

void sums_of_columns() {
  Random random(7);
  for (const Dtype dtype : {Dtype::kFloat64, Dtype::kFloat32, Dtype::kBFloat16, Dtype::kFloat16}) {
    for (const int64_t rows : {0, 1, 64, 65, 200}) {
      const int64_t cols = 21, stride = cols + 2, blocks = (rows + cpu::kColumnSumsBlock - 1) / cpu::kColumnSumsBlock;
      const bool fp64 = dtype == Dtype::kFloat64;
      const Dtype acc = fp64 ? Dtype::kFloat64 : Dtype::kFloat32;
      const Buffer source(dtype, rows * stride, random);
      Buffer partial(acc, blocks * cols), total(acc, cols);
      const cpu::ColumnSums a{rows, cols, source, stride, partial.data()};
      for (int64_t block = blocks; block-- > 0;) cpu::column_sums(a, block, block + 1);
      cpu::PartialSums s{};
      s.B = 1, s.blocks = blocks, s.R = 1, s.C = cols, s.partial = partial.data(), s.out[0] = total, s.fp64 = fp64;
      cpu::sum_partials(s, 0, 1);
      for (int64_t c = 0; c < cols; ++c) {
        double expected = 0;
        for (int64_t r = 0; r < rows; ++r) expected += source[r * stride + c];
        CHECK_CLOSE(total[c], expected, (fp64 ? 0x1p-53 : 0x1p-24) * 4 * static_cast<double>(rows));
      }
    }
  }
}

void tests() {
  every_code();
  every_rounding();
  addends();
  sums_of_columns();
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
