// The whole test framework of csrc/tests: CHECK and CHECK_CLOSE count failures, finish() is main's return value.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <exception>
#include <utility>
#include <vector>

#include "../common/dtype.h"
#include "../common/math.h"
#include "../cpu/kernels/isa.h"

namespace sana_ext::test {

inline int checks = 0, failures = 0;

inline void check(bool ok, const char* what, const char* file, int line) {
  ++checks;
  if (ok) return;
  if (++failures <= 20) std::printf("%s:%d: failed: %s\n", file, line, what);
}

inline void check_close(double got, double expected, double tolerance, const char* what, const char* file, int line) {
  ++checks;
  if (std::abs(got - expected) <= tolerance) return;  // false for a NaN
  if (++failures <= 20) {
    std::printf("%s:%d: failed: %s: got %.9g, expected %.9g within %.3g\n", file, line, what, got, expected, tolerance);
  }
}

#define CHECK(condition) ::sana_ext::test::check((condition), #condition, __FILE__, __LINE__)
#define CHECK_CLOSE(got, expected, tolerance) \
  ::sana_ext::test::check_close((got), (expected), (tolerance), #got, __FILE__, __LINE__)

constexpr int kSkipped = 77;  // SKIP_RETURN_CODE in CMakeLists.txt

// Runs the tests at the level that SANA_EXT_CPU_ISA names; skipped where the processor lacks it.
inline int run(void (*tests)()) {
  const char* level;
  try {
    level = cpu::isa_name(cpu::isa());
  } catch (const std::exception& error) {
    std::printf("skipped: %s\n", error.what());
    return kSkipped;
  }
  tests();
  std::printf("%s: %d checks, %d failures\n", level, checks, failures);
  return failures == 0 && checks > 0 ? 0 : 1;
}

// Reproducible numbers in [-2, 2).
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2654435769u + 1) {}
  uint32_t bits() {
    state_ = state_ * 6364136223846793005u + 1442695040888963407u;
    return static_cast<uint32_t>(state_ >> 32);
  }
  float operator()() { return static_cast<float>(bits()) * 0x1p-30f - 2.0f; }

 private:
  uint64_t state_;
};

// A tensor's elements in one of the four dtypes. The allocation has exactly `count` elements, so that a sanitizer sees
// one byte too far, and starts as NaN, so that an element nobody wrote is seen too.
class Buffer {
 public:
  Buffer(Dtype dtype, int64_t count) : dtype_(dtype), count_(count), bytes_(count * size_of(dtype), 0xff) {}
  Buffer(Dtype dtype, int64_t count, Random& random) : Buffer(dtype, count) {
    for (int64_t i = 0; i < count; ++i) set(i, random());
  }
  operator ConstPtr() const { return {bytes_.data(), dtype_}; }
  operator Ptr() { return {bytes_.data(), dtype_}; }
  void* data() { return bytes_.data(); }
  int64_t count() const { return count_; }

  double operator[](int64_t i) const {
    switch (dtype_) {
      case Dtype::kFloat64:
        return element<double>(i);
      case Dtype::kFloat32:
        return element<float>(i);
      case Dtype::kBFloat16:
        return bfloat16_to_float(element<uint16_t>(i));
      default:
        return half_to_float(element<uint16_t>(i));
    }
  }
  void set(int64_t i, double value) {
    switch (dtype_) {
      case Dtype::kFloat64:
        return store(i, value);
      case Dtype::kFloat32:
        return store(i, static_cast<float>(value));
      case Dtype::kBFloat16:
        return store(i, float_to_bfloat16(static_cast<float>(value)));
      default:
        return store(i, float_to_half(static_cast<float>(value)));
    }
  }
  // Relative rounding error of one store.
  double epsilon() const {
    switch (dtype_) {
      case Dtype::kFloat64:
        return 0x1p-53;
      case Dtype::kFloat32:
        return 0x1p-24;
      case Dtype::kBFloat16:
        return 0x1p-8;
      default:
        return 0x1p-11;
    }
  }

 private:
  template <class T>
  T element(int64_t i) const {
    T value;
    std::memcpy(&value, bytes_.data() + i * sizeof(T), sizeof(T));
    return value;
  }
  template <class T>
  void store(int64_t i, T value) {
    std::memcpy(bytes_.data() + i * sizeof(T), &value, sizeof(T));
  }

  Dtype dtype_;
  int64_t count_;
  std::vector<unsigned char> bytes_;
};

// A kernel over all its items, in `pieces` calls, as threads would share them.
template <class Args>
void in_pieces(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items, int64_t pieces) {
  for (int64_t i = 0; i < pieces; ++i) kernel(args, items * i / pieces, items * (i + 1) / pieces);
}

inline bool same(const Buffer& a, const Buffer& b) {
  if (a.count() == 0) return true;  // memcmp takes no null pointer, not even for nothing
  return std::memcmp(ConstPtr(a).data, ConstPtr(b).data, a.count() * size_of(ConstPtr(a).dtype)) == 0;
}

}  // namespace sana_ext::test
