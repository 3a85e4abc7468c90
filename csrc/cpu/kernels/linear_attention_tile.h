// What the forward and the backward of linear_attention share: moving one head's rows between a tensor and L1 scratch,
// and two register-tiled products. Scratch holds blocks of tokens as [tokens][P] accumulators.
#pragma once
#include <cfloat>
#include <type_traits>

#include "linear_attention.h"
#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {

// A tile is kTileRows rows by kTileVectors vectors of accumulator registers: as many as the level has registers for,
// with room for one row of the second factor.
template <class A>
struct Tile {
#if defined(__AVX512F__) || defined(__aarch64__)
  static constexpr int kRows = 8, kVectors = 2;
#elif defined(__AVX2__)
  static constexpr int kRows = 6, kVectors = 2;
#else
  static constexpr int kRows = 4, kVectors = 2;
#endif
};
template <>
struct Tile<double> {
  static constexpr int kRows = 2, kVectors = 1;
};

template <int kValue>
struct Int {
  static constexpr int value = kValue;
};

// f(first, Int<rows>) over [0, count): tiles of kRows, then of half as many, down to 1.
template <int kRows, class F>
SANA_EXT_INLINE void for_tiles(int64_t first, int64_t count, const F& f) {
  for (; first + kRows <= count; first += kRows) f(first, Int<kRows>{});
  if constexpr (kRows > 1) for_tiles<kRows / 2>(first, count, f);
}

// put(r, v, init[:] + sum_k x[r][k] m[k][:]) for kRows rows r and kVectors vectors v. `put` comes by value: what it
// holds is then in registers.
template <class A, int kRows, int kVectors, class Put>
__attribute__((noinline)) void multiply_tile(const A* x, const A* m, const A* init, int64_t depth, int64_t stride,
                                             const Put put) {
  Vec<A> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = init != nullptr ? load(init + v * kLanes) : Vec<A>{};
  for (int64_t k = 0; k < depth; ++k, m += stride) {
    Vec<A> row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load(m + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> factor = broadcast(x[r * stride + k]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) put(r, v, sum[r][v]);
}

// m[i][:] += sum_t x[t][i] y[t][:] for kRows rows i and kVectors vectors; m counts as 0 if it is `fresh`.
template <class A, int kRows, int kVectors>
__attribute__((noinline)) void accumulate_tile(const A* x, const A* y, A* m, int64_t tokens, int64_t stride,
                                               bool fresh) {
  Vec<A> sum[kRows][kVectors];
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) sum[r][v] = fresh ? Vec<A>{} : load(m + r * stride + v * kLanes);
  for (int64_t t = 0; t < tokens; ++t, x += stride, y += stride) {
    Vec<A> row[kVectors];
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) row[v] = load(y + v * kLanes);
#pragma GCC unroll 8
    for (int r = 0; r < kRows; ++r) {
      const Vec<A> factor = broadcast(x[r]);
#pragma GCC unroll 8
      for (int v = 0; v < kVectors; ++v) sum[r][v] += factor * row[v];
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < kRows; ++r)
#pragma GCC unroll 8
    for (int v = 0; v < kVectors; ++v) store(m + r * stride + v * kLanes, sum[r][v]);
}

// init [P] + x [tokens][P] * m [D][P] by tiles; init may be nullptr. to(t, c) makes what takes the tile at row t and
// column c: put(r, v, vector) for row t + r and column c + v * kLanes.
template <class A, class To>
SANA_EXT_INLINE void multiply(const A* x, const A* m, const A* init, int64_t tokens, int64_t D, int64_t P,
                              const To& to) {
  for_tiles<Tile<A>::kVectors>(0, P / kLanes, [&](int64_t v, auto vectors) SANA_EXT_LAMBDA_INLINE {
    const int64_t c = v * kLanes;
    for_tiles<Tile<A>::kRows>(0, tokens, [&](int64_t t, auto rows) SANA_EXT_LAMBDA_INLINE {
      multiply_tile<A, decltype(rows)::value, decltype(vectors)::value>(
          x + t * P, m + c, init == nullptr ? nullptr : init + c, D, P, to(t, c));
    });
  });
}

// out [tokens][P] = init [P] + x [tokens][P] * m [D][P]; init may be nullptr.
template <class A>
SANA_EXT_INLINE void multiply(const A* x, const A* m, const A* init, A* out, int64_t tokens, int64_t D, int64_t P) {
  multiply(x, m, init, tokens, D, P, [&](int64_t t, int64_t c) {
    A* target = out + t * P + c;
    return [target, P](int r, int v, Vec<A> sum) SANA_EXT_LAMBDA_INLINE { store(target + r * P + v * kLanes, sum); };
  });
}

// m [D][P] += x [tokens][P]^T * y [tokens][P]; m counts as 0 if it is `fresh`.
template <class A>
SANA_EXT_INLINE void accumulate(const A* x, const A* y, A* m, int64_t tokens, int64_t D, int64_t P,
                                bool fresh = false) {
  for_tiles<Tile<A>::kVectors>(0, P / kLanes, [&](int64_t v, auto vectors) SANA_EXT_LAMBDA_INLINE {
    const int64_t c = v * kLanes;
    for_tiles<Tile<A>::kRows>(0, D, [&](int64_t i, auto rows) SANA_EXT_LAMBDA_INLINE {
      accumulate_tile<A, decltype(rows)::value, decltype(vectors)::value>(x + i, y + c, m + i * P + c, tokens, P,
                                                                          fresh);
    });
  });
}

// Lane i of the result is the sum of the lanes of v[i], added up in a fixed order; v is overwritten. A tree of
// interleavings; kLanes single sums take several times the instructions.
#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define SANA_EXT_SHUFFLE(...) __builtin_shufflevector(__VA_ARGS__)
#endif
#endif
#if defined(SANA_EXT_SHUFFLE)
// a0 b0 a1 b1 ... of the low halves plus the same of the high halves.
template <class V>
SANA_EXT_INLINE V add_halves(V a, V b) {
#if defined(__AVX512F__)
  return SANA_EXT_SHUFFLE(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23) +
         SANA_EXT_SHUFFLE(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif defined(__AVX2__)
  return SANA_EXT_SHUFFLE(a, b, 0, 8, 1, 9, 2, 10, 3, 11) + SANA_EXT_SHUFFLE(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  return SANA_EXT_SHUFFLE(a, b, 0, 4, 1, 5) + SANA_EXT_SHUFFLE(a, b, 2, 6, 3, 7);
#endif
}
template <class A, int kWidth = kLanes / 2>
SANA_EXT_INLINE Vec<A> sum_each(Vec<A> (&v)[kLanes]) {
#pragma GCC unroll 8
  for (int i = 0; i < kWidth; ++i) v[i] = add_halves(v[i], v[i + kWidth]);
  if constexpr (kWidth > 1) return sum_each<A, kWidth / 2>(v);
  return v[0];
}
#else
template <class A>
SANA_EXT_INLINE Vec<A> sum_each(Vec<A> (&v)[kLanes]) {
  Vec<A> result;
  for (int i = 0; i < kLanes; ++i) result[i] = sum_lanes<A>(v[i]);
  return result;
}
#endif

// dot(x, y) of P elements.
template <class A>
SANA_EXT_INLINE A dot(const A* x, const A* y, int64_t P) {
  Vec<A> sum{};
  for (int64_t c = 0; c < P; c += kLanes) sum += load(x + c) * load(y + c);
  return sum_lanes<A>(sum);
}

// 1 / d, and 0 where d is 0 or so small that 1 / d overflows; NaN stays NaN.
template <class A>
SANA_EXT_INLINE A inverse(A d) {
  return d < A(sizeof(A) == 8 ? DBL_MIN : FLT_MIN) ? A(0) : A(1) / d;
}

template <class A>
SANA_EXT_INLINE Vec<A> inverse(Vec<A> d) {
  return d < broadcast(A(sizeof(A) == 8 ? DBL_MIN : FLT_MIN)) ? Vec<A>{} : broadcast(A(1)) / d;
}

// The first `count` elements at p (count may be <= 0 or more than a vector), the other lanes 0.
template <class A, class T>
SANA_EXT_INLINE Vec<A> load_part(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  A lanes[kLanes] = {};
  for (int64_t i = 0; i < count; ++i) lanes[i] = load_one(p + i);
  return load(lanes);
}
template <class A, class T>
SANA_EXT_INLINE void store_part(T* p, Vec<A> v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  A lanes[kLanes];
  store(lanes, v);
  for (int64_t i = 0; i < count; ++i) store_one(p + i, lanes[i]);
}

// f(t, c, vector) over the D channels of head h of `tokens` tokens from token n on; columns past D come as 0, up to P.
// Meanwhile the next head's rows are fetched: rows are kilobytes apart, which the hardware does not foresee.
template <class A, class F>
SANA_EXT_INLINE void read_head(const LinearAttentionRows<ConstPtr>& x, int64_t b, int64_t n, int64_t h, int64_t tokens,
                               int64_t D, int64_t P, const F& f) {
  const int64_t offset = b * x.stride_b + n * x.stride_n + h * x.stride_h;
  with_type<A>(x.p.dtype, static_cast<const char*>(x.p.data) + offset * size_of(x.p.dtype),
               [&](const auto* p) SANA_EXT_LAMBDA_INLINE {
                 for (int64_t t = 0; t < tokens; ++t, p += x.stride_n) {
                   for (int64_t c = 0; c < D; c += 64 / static_cast<int64_t>(sizeof *p))
                     __builtin_prefetch(p + x.stride_h + c);
#pragma GCC unroll 8
                   for (int64_t c = 0; c < P; c += kLanes) f(t, c, load_part<A>(p + c, D - c));
                 }
               });
}

// f(p) with p the first element of head h of token n.
template <class A, class Pointer, class F>
SANA_EXT_INLINE void on_head(const LinearAttentionRows<Pointer>& x, int64_t b, int64_t n, int64_t h, const F& f) {
  using Bytes = std::conditional_t<std::is_same_v<Pointer, Ptr>, char, const char>;
  const int64_t offset = b * x.stride_b + n * x.stride_n + h * x.stride_h;
  with_type<A>(x.p.dtype, static_cast<Bytes*>(x.p.data) + offset * size_of(x.p.dtype), f);
}

// Writes f(t, c), a vector, over the same range.
template <class A, class F>
SANA_EXT_INLINE void write_head(const LinearAttentionRows<Ptr>& x, int64_t b, int64_t n, int64_t h, int64_t tokens,
                                int64_t D, const F& f) {
  const int64_t offset = b * x.stride_b + n * x.stride_n + h * x.stride_h;
  with_type<A>(x.p.dtype, static_cast<char*>(x.p.data) + offset * size_of(x.p.dtype),
               [&](auto* p) SANA_EXT_LAMBDA_INLINE {
                 for (int64_t t = 0; t < tokens; ++t, p += x.stride_n)
#pragma GCC unroll 8
                   for (int64_t c = 0; c < D; c += kLanes) store_part<A>(p + c, f(t, c), D - c);
               });
}

// The norm's weights as [H][P] accumulators; 1 where there is no norm.
template <class A>
SANA_EXT_INLINE void load_weights(ConstPtr weight, const LinearAttentionSize& size, A* out) {
  if (!weight) {
    for (int64_t i = 0; i < size.H * size.P; ++i) out[i] = A(1);
    return;
  }
  const int64_t D = size.D, P = size.P;
  with_type<A>(weight.dtype, weight.data, [&](const auto* w) {
    for (int64_t h = 0; h < size.H; ++h)
      for (int64_t c = 0; c < P; c += kLanes) store(out + h * P + c, load_part<A>(w + h * D + c, D - c));
  });
}

// f(t, each) for `tokens` tokens; each(g) calls g(value, slot) for all channels of all heads of token t.
template <class A, class F>
SANA_EXT_INLINE void for_row_pieces(const LinearAttentionRows<ConstPtr>& x, const LinearAttentionSize& size, int64_t b,
                                    int64_t n, int64_t tokens, const F& f) {
  const bool dense = x.stride_h == size.D;
  const int64_t pieces = dense ? 1 : size.H, count = dense ? size.H * size.D : size.D;
  const int64_t offset = b * x.stride_b + n * x.stride_n;
  with_type<A>(x.p.dtype, static_cast<const char*>(x.p.data) + offset * size_of(x.p.dtype), [&](const auto* p) {
    for (int64_t t = 0; t < tokens; ++t, p += x.stride_n)
      f(t, [&](const auto& g) SANA_EXT_LAMBDA_INLINE {
        for (int64_t h = 0; h < pieces; ++h)
          for_each_slot(count, [&](auto v, int64_t c, auto slot)
                                   SANA_EXT_LAMBDA_INLINE { g(v.load(p + h * x.stride_h + c), slot); });
      });
  });
}

// rstd[t] = 1 / sqrt(mean(x^2) + norm_eps) over all heads of `tokens` tokens.
template <class A>
void row_rstd(const LinearAttentionRows<ConstPtr>& x, const LinearAttentionSize& size, int64_t b, int64_t n,
              int64_t tokens, double norm_eps, A* rstd) {
  for_row_pieces<A>(x, size, b, n, tokens, [&](int64_t t, const auto& each) SANA_EXT_LAMBDA_INLINE {
    Sum<A> squares;
    each([&](auto value, auto slot) SANA_EXT_LAMBDA_INLINE { squares.add(value * value, slot); });
    rstd[t] = A(1) / std::sqrt(squares.total() / A(size.H * size.D) + A(norm_eps));
  });
}

// 0, and NaN where x is infinite or NaN: what a norm makes of x, whose scale is then 0 or NaN, even where a ReLU or a
// cancelled scale would hide it.
template <class V>
SANA_EXT_INLINE V poison(V x) {
  return x - x;
}

// The sum of poison over all heads of each of `tokens` tokens.
template <class A>
void row_poison(const LinearAttentionRows<ConstPtr>& x, const LinearAttentionSize& size, int64_t b, int64_t n,
                int64_t tokens, A* result) {
  for_row_pieces<A>(x, size, b, n, tokens, [&](int64_t t, const auto& each) SANA_EXT_LAMBDA_INLINE {
    Sum<A> sum;
    each([&](auto value, auto slot) SANA_EXT_LAMBDA_INLINE { sum.add(poison(value), slot); });
    result[t] = sum.total();
  });
}

// Calls f(Int<D>) for the head size with a path of its own, else f(Int<0>): any D.
template <class F>
SANA_EXT_INLINE void with_head_size(int64_t D, const F& f) {
  D == 32 ? f(Int<32>{}) : f(Int<0>{});
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
