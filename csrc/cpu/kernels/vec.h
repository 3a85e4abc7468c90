// The SIMD layer: GCC/Clang vector types of kLanes elements, conversions from and to 16-bit floats, exp.
// Included only by the kernel files of this folder, which are compiled once per instruction set level: everything
// lives in namespace sana_ext::cpu::SANA_EXT_ISA. Kernel files use no std:: templates: the linker keeps one copy of an
// inline function, and it must not be the one compiled for AVX-512. Arithmetic uses the compiler's vector operators
// (a*b+c becomes an FMA under -ffp-contract=fast); intrinsics stand only where the operators have no word for it.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif

#include "../../common/dtype.h"
#include "../../common/math.h"

#ifndef SANA_EXT_ISA
#error "compile with -DSANA_EXT_ISA=baseline|avx2|avx512"
#endif
#define SANA_EXT_INLINE inline __attribute__((always_inline))
#define SANA_EXT_LAMBDA_INLINE __attribute__((always_inline))  // between a lambda's parameters and its body

namespace sana_ext::cpu::SANA_EXT_ISA {

#if defined(__AVX512F__)
constexpr int kLanes = 16;
#elif defined(__AVX2__)
constexpr int kLanes = 8;
#else
constexpr int kLanes = 4;  // SSE2, NEON
#endif

template <class T>
struct VecType;
template <>
struct VecType<float> {
  typedef float type __attribute__((vector_size(4 * kLanes)));
};
template <>
struct VecType<double> {
  typedef double type __attribute__((vector_size(8 * kLanes)));
};
template <>
struct VecType<int32_t> {
  typedef int32_t type __attribute__((vector_size(4 * kLanes)));
};
template <>
struct VecType<uint32_t> {
  typedef uint32_t type __attribute__((vector_size(4 * kLanes)));
};
template <>
struct VecType<uint16_t> {
  typedef uint16_t type __attribute__((vector_size(2 * kLanes)));
};
// A vector of kLanes accumulators, float or double. With double the compiler splits it over several registers.
template <class A>
using Vec = typename VecType<A>::type;

template <class A>
SANA_EXT_INLINE Vec<A> broadcast(A value) {
  return value - Vec<A>{};
}

template <class A>
SANA_EXT_INLINE Vec<A> load(const A* p) {
  Vec<A> v;
  std::memcpy(&v, p, sizeof v);
  return v;
}
template <class A>
SANA_EXT_INLINE void store(A* p, Vec<A> v) {
  std::memcpy(p, &v, sizeof v);
}

template <class A>
SANA_EXT_INLINE Vec<A> relu(Vec<A> v) {
  return Vec<A>{} > v ? Vec<A>{} : v;
}  // NaN stays NaN

// Sum of the lanes in a fixed order (pairwise halves).
template <class A>
SANA_EXT_INLINE A sum_lanes(Vec<A> v) {
  A lanes[kLanes];
  store(lanes, v);
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) lanes[i] += lanes[i + width];
  return lanes[0];
}

// 16-bit conversions of one vector.

SANA_EXT_INLINE Vec<float> load_bf16(const uint16_t* p) {
  const auto bits = __builtin_convertvector(load<uint16_t>(p), Vec<uint32_t>) << 16;
  return reinterpret_cast<Vec<float>>(bits);
}

SANA_EXT_INLINE void store_bf16(uint16_t* p, Vec<float> v) {  // round to nearest even, NaN stays NaN
  const auto bits = reinterpret_cast<Vec<uint32_t>>(v);
  const auto rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const auto result = (bits & 0x7fffffffu) > 0x7f800000u ? ((bits >> 16) | 0x40u) : rounded;
  store<uint16_t>(p, __builtin_convertvector(result, Vec<uint16_t>));
}

SANA_EXT_INLINE Vec<float> load_f16(const uint16_t* p) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(__F16C__)
  return (Vec<float>)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#elif defined(__aarch64__)
  return (Vec<float>)vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(p)));
#else
  Vec<float> v;
  for (int i = 0; i < kLanes; ++i) v[i] = half_to_float(p[i]);
  return v;
#endif
}

SANA_EXT_INLINE void store_f16(uint16_t* p, Vec<float> v) {  // round to nearest even
#if defined(__AVX512F__)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__F16C__)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT));
#elif defined(__aarch64__)
  vst1_u16(p, vreinterpret_u16_f16(vcvt_f16_f32((float32x4_t)v)));
#else
  for (int i = 0; i < kLanes; ++i) p[i] = float_to_half(v[i]);
#endif
}

// Elements of a tensor, loaded as and stored from accumulators: float and double as they are, 16-bit types converted.
struct BFloat16 {
  uint16_t bits;
};
struct Float16 {
  uint16_t bits;
};
SANA_EXT_INLINE Vec<float> load(const BFloat16* p) { return load_bf16(&p->bits); }
SANA_EXT_INLINE Vec<float> load(const Float16* p) { return load_f16(&p->bits); }
SANA_EXT_INLINE void store(BFloat16* p, Vec<float> v) { store_bf16(&p->bits, v); }
SANA_EXT_INLINE void store(Float16* p, Vec<float> v) { store_f16(&p->bits, v); }
SANA_EXT_INLINE float load_one(const float* p) { return *p; }
SANA_EXT_INLINE double load_one(const double* p) { return *p; }
SANA_EXT_INLINE float load_one(const BFloat16* p) { return bfloat16_to_float(p->bits); }
SANA_EXT_INLINE float load_one(const Float16* p) { return half_to_float(p->bits); }
SANA_EXT_INLINE void store_one(float* p, float v) { *p = v; }
SANA_EXT_INLINE void store_one(double* p, double v) { *p = v; }
SANA_EXT_INLINE void store_one(BFloat16* p, float v) { p->bits = float_to_bfloat16(v); }
SANA_EXT_INLINE void store_one(Float16* p, float v) { p->bits = float_to_half(v); }

// Calls f with `data` as a pointer to its elements, so that f is compiled once per element type that A accumulates.
template <class A, class F>
SANA_EXT_INLINE void with_type(Dtype dtype, const void* data, const F& f) {
  if constexpr (sizeof(A) == 8) {
    f(static_cast<const double*>(data));
  } else {
    switch (dtype) {
      case Dtype::kBFloat16:
        return f(static_cast<const BFloat16*>(data));
      case Dtype::kFloat16:
        return f(static_cast<const Float16*>(data));
      default:
        return f(static_cast<const float*>(data));
    }
  }
}
template <class A, class F>
SANA_EXT_INLINE void with_type(Dtype dtype, void* data, const F& f) {
  if constexpr (sizeof(A) == 8) {
    f(static_cast<double*>(data));
  } else {
    switch (dtype) {
      case Dtype::kBFloat16:
        return f(static_cast<BFloat16*>(data));
      case Dtype::kFloat16:
        return f(static_cast<Float16*>(data));
      default:
        return f(static_cast<float*>(data));
    }
  }
}

// max(x, low) and min(x, high), one instruction each where the operators would take two; a NaN in x stays.
SANA_EXT_INLINE Vec<float> at_least(Vec<float> x, float low) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_max_ps((__m512)broadcast(low), (__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_max_ps((__m256)broadcast(low), (__m256)x);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_max_ps((__m128)broadcast(low), (__m128)x);
#elif defined(__aarch64__)
  return (Vec<float>)vmaxq_f32((float32x4_t)broadcast(low), (float32x4_t)x);
#else
  return x < low ? broadcast(low) : x;
#endif
}
SANA_EXT_INLINE Vec<float> at_most(Vec<float> x, float high) {
#if defined(__AVX512F__)
  return (Vec<float>)_mm512_min_ps((__m512)broadcast(high), (__m512)x);
#elif defined(__AVX2__)
  return (Vec<float>)_mm256_min_ps((__m256)broadcast(high), (__m256)x);
#elif defined(__x86_64__)
  return (Vec<float>)_mm_min_ps((__m128)broadcast(high), (__m128)x);
#elif defined(__aarch64__)
  return (Vec<float>)vminq_f32((float32x4_t)broadcast(high), (float32x4_t)x);
#else
  return x > high ? broadcast(high) : x;
#endif
}

// 2^(scale * x) for scale * x in [-126, 127]: 2^k * p(r) with k the nearest integer and r the rest. p is the minimax
// polynomial of degree 5 on [-1/2, 1/2] with p(0) = 1; relative error 9.2e-8 before rounding. n vectors go in step: one
// alone is a chain of dependent instructions that fills the processor's window long before it fills its ports.
template <int n>
SANA_EXT_INLINE void exp2_scaled(const Vec<float> (&x)[n], float scale, Vec<float> (&result)[n]) {
  const auto magic = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to the nearest integer
  Vec<float> shifted[n], r[n];
  for (int i = 0; i < n; ++i) shifted[i] = x[i] * scale + magic;
  for (int i = 0; i < n; ++i) r[i] = x[i] * scale - (shifted[i] - magic);  // one rounding where there is an FMA
  auto& p = result;
  for (int i = 0; i < n; ++i) p[i] = r[i] * 1.3264727e-3f + 9.6715127e-3f;
  for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + 5.5507337e-2f;
  for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + 2.4022242e-1f;
  for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + 6.9314698e-1f;
  for (int i = 0; i < n; ++i) p[i] = p[i] * r[i] + 1.0f;
  // k stands in the low bits of `shifted`; adding it to the exponent field of p multiplies by 2^k.
  for (int i = 0; i < n; ++i)
    p[i] = reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<uint32_t>>(p[i]) +
                                        (reinterpret_cast<Vec<uint32_t>>(shifted[i]) << 23));
}

constexpr float kLog2e = 1.44269504f;

// exp in float, clamped outside [-87, 88].
SANA_EXT_INLINE Vec<float> exp(Vec<float> x) {
  const Vec<float> clamped[1] = {at_most(at_least(x, -87.0f), 88.0f)};
  Vec<float> result[1];
  exp2_scaled(clamped, kLog2e, result);
  return result[0];
}

SANA_EXT_INLINE Vec<double> exp(Vec<double> x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

// Sigmoid of n vectors in step; floats are at least -88 (there sigmoid is 6e-39).
template <int n>
SANA_EXT_INLINE void sigmoid(const Vec<float> (&x)[n], Vec<float> (&result)[n]) {
  Vec<float> d[n];
  for (int i = 0; i < n; ++i) result[i] = at_most(x[i], 87.0f);
  exp2_scaled(result, -kLog2e, d);
  for (int i = 0; i < n; ++i) d[i] = d[i] + 1.0f;  // in [1, 2^127]
#if defined(__AVX512F__)
  // An estimate and a Newton step: cheaper than a division of 16 lanes.
  for (int i = 0; i < n; ++i) result[i] = (Vec<float>)_mm512_rcp14_ps((__m512)d[i]);
  for (int i = 0; i < n; ++i) d[i] = 1.0f - d[i] * result[i];
  for (int i = 0; i < n; ++i) result[i] = result[i] * d[i] + result[i];
#else
  for (int i = 0; i < n; ++i) result[i] = 1.0f / d[i];
#endif
}
template <int n>
SANA_EXT_INLINE void sigmoid(const Vec<double> (&x)[n], Vec<double> (&result)[n]) {
  for (int i = 0; i < n; ++i) result[i] = 1.0 / (1.0 + exp(-x[i]));
}

// A 64-byte aligned temporary of `count` elements, rounded up to whole vectors; uninitialised.
template <class A>
class Scratch {
 public:
  explicit Scratch(int64_t count) {
    if (count <= 0) return;
    const size_t bytes = (static_cast<size_t>(count) * sizeof(A) + kLanes * sizeof(A) + 63) / 64 * 64;
    data_ = static_cast<A*>(std::aligned_alloc(64, bytes));
    if (data_ == nullptr) throw std::bad_alloc();
  }
  ~Scratch() { std::free(data_); }
  Scratch(const Scratch&) = delete;
  Scratch& operator=(const Scratch&) = delete;
  SANA_EXT_INLINE A* data() { return data_; }
  SANA_EXT_INLINE const A* data() const { return data_; }
  SANA_EXT_INLINE A& operator[](int64_t i) { return data_[i]; }

 private:
  A* data_ = nullptr;
};

template <class A>
SANA_EXT_INLINE void zero(A* p, int64_t count) {
  std::memset(p, 0, static_cast<size_t>(count) * sizeof(A));
}

// Rows. `count` elements starting `offset` elements after p, as accumulators: the tensor's own memory when its type is
// A already, else converted into `scratch` (room for `count` rounded up to kLanes).

template <class A>
const A* load_row(ConstPtr p, int64_t offset, int64_t count, A* scratch);

template <>
inline const double* load_row<double>(ConstPtr p, int64_t offset, int64_t, double*) {
  return static_cast<const double*>(p.data) + offset;
}

template <>
inline const float* load_row<float>(ConstPtr p, int64_t offset, int64_t count, float* scratch) {
  if (p.dtype == Dtype::kFloat32) return static_cast<const float*>(p.data) + offset;
  const auto* source = static_cast<const uint16_t*>(p.data) + offset;
  int64_t i = 0;
  if (p.dtype == Dtype::kBFloat16) {
    for (; i + kLanes <= count; i += kLanes) store(scratch + i, load_bf16(source + i));
    for (; i < count; ++i) scratch[i] = bfloat16_to_float(source[i]);
  } else {
    for (; i + kLanes <= count; i += kLanes) store(scratch + i, load_f16(source + i));
    for (; i < count; ++i) scratch[i] = half_to_float(source[i]);
  }
  return scratch;
}

template <class A>
void store_row(Ptr p, int64_t offset, int64_t count, const A* source);

template <>
inline void store_row<double>(Ptr p, int64_t offset, int64_t count, const double* source) {
  std::memcpy(static_cast<double*>(p.data) + offset, source, static_cast<size_t>(count) * sizeof(double));
}

template <>
inline void store_row<float>(Ptr p, int64_t offset, int64_t count, const float* source) {
  if (p.dtype == Dtype::kFloat32) {
    std::memcpy(static_cast<float*>(p.data) + offset, source, static_cast<size_t>(count) * sizeof(float));
    return;
  }
  auto* target = static_cast<uint16_t*>(p.data) + offset;
  int64_t i = 0;
  if (p.dtype == Dtype::kBFloat16) {
    for (; i + kLanes <= count; i += kLanes) store_bf16(target + i, load(source + i));
    for (; i < count; ++i) target[i] = float_to_bfloat16(source[i]);
  } else {
    for (; i + kLanes <= count; i += kLanes) store_f16(target + i, load(source + i));
    for (; i < count; ++i) target[i] = float_to_half(source[i]);
  }
}

// One formula for whole vectors and for the tail: for_each(count, [&](auto lanes, int64_t i) { ... }) calls the body
// with `Whole` at i = 0, kLanes, ... and with `One` for each remaining element; lanes.load(p + i) is a Vec<A> or an A.
struct Whole {
  template <class T>
  static SANA_EXT_INLINE auto load(const T* p) {
    return SANA_EXT_ISA::load(p);
  }
  template <class T, class V>
  static SANA_EXT_INLINE void store(T* p, V v) {
    SANA_EXT_ISA::store(p, v);
  }
};
struct One {
  template <class T>
  static SANA_EXT_INLINE auto load(const T* p) {
    return load_one(p);
  }
  template <class T, class A>
  static SANA_EXT_INLINE void store(T* p, A v) {
    store_one(p, v);
  }
};

template <class Body>
SANA_EXT_INLINE void for_each(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + kLanes <= count; i += kLanes) body(Whole{}, i);
  for (; i < count; ++i) body(One{}, i);
}

// The same, four vectors at a time, for bodies that sum: body(lanes, i, slot), slot = 0..3 a compile-time constant,
// keeps four independent chains of additions in flight.
template <int kSlot>
struct Slot {};
template <class Body>
SANA_EXT_INLINE void for_each_slot(int64_t count, const Body& body) {
  int64_t i = 0;
  for (; i + 4 * kLanes <= count; i += 4 * kLanes) {
    body(Whole{}, i, Slot<0>{});
    body(Whole{}, i + kLanes, Slot<1>{});
    body(Whole{}, i + 2 * kLanes, Slot<2>{});
    body(Whole{}, i + 3 * kLanes, Slot<3>{});
  }
  for (; i + kLanes <= count; i += kLanes) body(Whole{}, i, Slot<0>{});
  for (; i < count; ++i) body(One{}, i, Slot<0>{});
}

// A sum fed with whole vectors and single elements, added up in a fixed order.
template <class A>
struct Sum {
  Vec<A> whole[4] = {};
  A one = 0;
  template <int kSlot = 0>
  SANA_EXT_INLINE void add(Vec<A> v, Slot<kSlot> = {}) {
    whole[kSlot] += v;
  }
  template <int kSlot = 0>
  SANA_EXT_INLINE void add(A v, Slot<kSlot> = {}) {
    one += v;
  }
  SANA_EXT_INLINE A total() const { return sum_lanes<A>((whole[0] + whole[1]) + (whole[2] + whole[3])) + one; }
};

}  // namespace sana_ext::cpu::SANA_EXT_ISA
