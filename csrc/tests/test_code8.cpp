// common/code8.h: the tables, and the encoder without a search against a search in the table, at every border and its
// neighbours and at a walk through all magnitudes.
#include "../common/code8.h"

#include <algorithm>
#include <cstdlib>
#include <vector>

#include "check_test.h"

namespace sana_ext::test {
namespace {

constexpr DynamicCode kSigned = make_dynamic_code(true), kUnsigned = make_dynamic_code(false);

// The definition: how many borders lie below x.
int search(const DynamicCode& t, float x) {
  return static_cast<int>(std::lower_bound(t.border, t.border + t.top, x) - t.border);
}

// The same checksum stands in tests/ops/test_code8.py for the table of the reference.
uint32_t checksum(const DynamicCode& t) {
  uint32_t hash = 2166136261u;
  for (int k = 0; k <= t.top; ++k) {
    for (int shift = 0; shift < 32; shift += 8) {
      hash = (hash ^ (float_bits(t.magnitude[k]) >> shift & 0xff)) * 16777619u;
    }
  }
  return hash;
}

void tables() {
  CHECK(kSigned.top == 128 && kUnsigned.top == 255);
  CHECK(checksum(kSigned) == 0xb707ebe0u);
  CHECK(checksum(kUnsigned) == 0xa1f0a4cfu);
  for (const DynamicCode* t : {&kSigned, &kUnsigned}) {
    for (int k = 0; k <= t->top; ++k) CHECK(dynamic_magnitude(k, t == &kSigned) == t->magnitude[k]);
    for (int k = 0; k < t->top; ++k) {
      CHECK(t->magnitude[k] < t->border[k] && t->border[k] < t->magnitude[k + 1]);
      CHECK(encode_magnitude(*t, t->magnitude[k]) == k);
    }
  }
}

void at_borders() {
  for (const DynamicCode* t : {&kSigned, &kUnsigned}) {
    for (int k = 0; k < t->top; ++k) {
      CHECK(encode_magnitude(*t, t->border[k]) == k);  // the neighbour nearer to zero
      const uint32_t bits = float_bits(t->border[k]);
      for (uint32_t ulp = 1; ulp <= 64; ++ulp) {
        CHECK(encode_magnitude(*t, bits_float(bits - ulp)) == k);
        CHECK(encode_magnitude(*t, bits_float(bits + ulp)) == k + 1);
      }
    }
  }
}

uint32_t stride = 1009;

// Magnitudes from 0 to just above 1 in rising order, every `stride`-th of them.
void walk() {
  for (const DynamicCode* t : {&kSigned, &kUnsigned}) {
    int expected = 0, wrong = 0;
    for (uint32_t bits = 0; bits <= 0x3f800001u; bits += stride) {
      const float x = bits_float(bits);
      while (expected < t->top && x > t->border[expected]) ++expected;
      wrong += encode_magnitude(*t, x) != expected;
    }
    CHECK(wrong == 0);
    CHECK(expected == t->top);
  }
}

void signs_and_specials() {
  Random random(1);
  for (int i = 0; i < 200000; ++i) {
    const float x = bits_float(random.bits() % 0x3f800001u);  // any magnitude up to 1, most of them tiny
    CHECK(encode_unsigned(kUnsigned, x, 1.0f) == std::max(search(kUnsigned, x), x > 0 ? 1 : 0));
    CHECK(encode_unsigned(kUnsigned, -x, 1.0f) == 0);
    CHECK(encode_signed(kSigned, x) == kCodeZero + search(kSigned, x));
    CHECK(encode_signed(kSigned, -x) == kCodeZero - std::min(search(kSigned, x), kCodeZero));
  }
  for (int code = 0; code < 256; ++code) {
    const auto byte = static_cast<uint8_t>(code);
    CHECK(encode_signed(kSigned, decode_signed(kSigned, byte)) == code);
    CHECK(encode_unsigned(kUnsigned, decode_unsigned(kUnsigned, byte), 1.0f) == code);
  }
  const float nan = bits_float(0x7fc00000u);
  CHECK(encode_signed(kSigned, nan) == kCodeZero && encode_unsigned(kUnsigned, nan, 1.0f) == 0);
  CHECK(encode_unsigned(kUnsigned, 1e-30f, 1e-20f) == 1);  // the product underflows
  CHECK(encode_signed(kSigned, -0.0f) == kCodeZero);
  CHECK(saturated(nan) == 0 && saturated(HUGE_VALF) == kCodeLargest && saturated(-HUGE_VALF) == -kCodeLargest);
  CHECK(saturated(kCodeLargest) == kCodeLargest && saturated(-1.5f) == -1.5f);
  CHECK(code_scale(0x1.fffffep-101f) == 0 && code_scale(kCodeSmallest) == kCodeSmallest);
  CHECK(unsigned_code_scale(0) == 0 && unsigned_code_scale(1e-44f) == kCodeSmallest && unsigned_code_scale(2) == 2);
  CHECK(code_inverse(0) == 0 && code_inverse(kCodeLargest) == kCodeSmallest);
}

void linear() {
  Random random(2);
  for (int i = 0; i < 20000; ++i) {
    const float least = random(),
                high = least + (random() + 2) * std::ldexp(1.0f, static_cast<int>(random.bits() % 40) - 30);
    const float step = linear_step(least, high), inverse = code_inverse(step), low = linear_low(least, high, step);
    CHECK(encode_linear(least, low, inverse) == 0);
    if (step == 0) continue;
    CHECK(encode_linear(high, low, inverse) >= (crosses_zero(least, high) ? 254 : 255));
    const float x = least + (high - least) * (random() + 2) / 4;
    const uint8_t code = encode_linear(x, low, inverse);
    CHECK_CLOSE(decode_linear(code, low, step), x, step * 0.5001 + 3e-7 * std::abs(x));
    if (crosses_zero(least, high)) CHECK(decode_linear(encode_linear(0.0f, low, inverse), low, step) == 0);
  }
  CHECK(encode_linear(0.5f, 0, 1) == 0 && encode_linear(1.5f, 0, 1) == 2 && encode_linear(2.5f, 0, 1) == 2);
  CHECK(linear_step(3, 3) == 0 && decode_linear(0, 3, 0) == 3);
}

void tests() {
  tables();
  at_borders();
  walk();
  signs_and_specials();
  linear();
}

}  // namespace
}  // namespace sana_ext::test

// An argument is the stride of the walk; 1 takes every float, in ten seconds.
int main(int argc, char** argv) {
  if (argc > 1) sana_ext::test::stride = static_cast<uint32_t>(std::atoi(argv[1]));
  return sana_ext::test::run(sana_ext::test::tests);
}
