// Scalar conversions of common/math.h: every 16-bit value there and back, and rounding against exact arithmetic in
// double.
#include "check_test.h"

namespace sana_ext::test {
namespace {

struct Format {
  const char* name;
  int exponent_bits, mantissa_bits;
  float (*widen)(uint16_t);
  uint16_t (*narrow)(float);
};

// The value of a finite encoding, from the definition of the format.
double decode(const Format& f, uint16_t bits) {
  const int exponent = bits >> f.mantissa_bits & ((1 << f.exponent_bits) - 1);
  const double fraction = bits & ((1 << f.mantissa_bits) - 1);
  const int bias = (1 << (f.exponent_bits - 1)) - 1;
  const double scale = std::ldexp(1.0, (exponent == 0 ? 1 : exponent) - bias - f.mantissa_bits);
  const double magnitude = ((exponent == 0 ? 0 : 1 << f.mantissa_bits) + fraction) * scale;
  return bits & 0x8000 ? -magnitude : magnitude;
}

void every_encoding(const Format& f) {
  const uint16_t infinity = ((1 << f.exponent_bits) - 1) << f.mantissa_bits;
  for (uint32_t i = 0; i < 0x10000; ++i) {
    const uint16_t bits = static_cast<uint16_t>(i), magnitude = bits & 0x7fff;
    const float wide = f.widen(bits);
    if (magnitude > infinity) {
      CHECK(std::isnan(wide));
      CHECK(std::isnan(f.widen(f.narrow(wide))));
    } else if (magnitude == infinity) {
      CHECK(std::isinf(wide) && std::signbit(wide) == (bits >> 15));
      CHECK(f.narrow(wide) == bits);
    } else {
      CHECK(static_cast<double>(wide) == decode(f, bits) && std::signbit(wide) == (bits >> 15));
      CHECK(f.narrow(wide) == bits);
    }
  }
}

// Between two neighbours: the middle goes to the even one, anything nearer to one side goes there.
void round_to_nearest_even(const Format& f) {
  const uint16_t infinity = ((1 << f.exponent_bits) - 1) << f.mantissa_bits;
  for (uint16_t low = 0; low < infinity; ++low) {
    const uint16_t high = low + 1;
    const double a = decode(f, low);
    const double b =
        high == infinity ? 2 * a - decode(f, low - 1) : decode(f, high);  // what would come after the largest
    const float middle = static_cast<float>((a + b) / 2);
    if (static_cast<double>(middle) != (a + b) / 2) continue;  // below float's own precision
    CHECK(f.narrow(middle) == (low % 2 == 0 ? low : high));
    CHECK(f.narrow(std::nextafter(middle, 0.0f)) == low);
    CHECK(f.narrow(std::nextafter(middle, HUGE_VALF)) == high);
    CHECK(f.narrow(-middle) == (0x8000 | (low % 2 == 0 ? low : high)));
  }
  CHECK(f.narrow(HUGE_VALF) == infinity);
  CHECK(f.narrow(0x1.fffffep127f) == infinity);
}

void tests() {
  const Format formats[] = {{"bfloat16", 8, 7, bfloat16_to_float, float_to_bfloat16},
                            {"float16", 5, 10, half_to_float, float_to_half}};
  for (const Format& format : formats) {
    every_encoding(format);
    round_to_nearest_even(format);
  }
  CHECK(std::isnan(bfloat16_to_float(float_to_bfloat16(bits_float(0x7f800001u)))));  // a NaN whose payload is cut off
  CHECK(std::isnan(half_to_float(float_to_half(bits_float(0x7f800001u)))));
}

}  // namespace
}  // namespace sana_ext::test

int main() { return sana_ext::test::run(sana_ext::test::tests); }
