#include "linear.h"

#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

// y[m, f] for MR rows and FR outputs: MR * FR dot products that share every load. Eight accumulators keep both FMA
// units busy without spilling at any level.
template <int MR, int FR, class A, class W>
SANA_EXT_INLINE void tile(const A* x, const W* weight, int64_t weight_stride, int64_t K, A (&y)[MR][FR]) {
  Vec<A> sums[MR][FR]{};
  int64_t k = 0;
  for (; k + kLanes <= K; k += kLanes) {
    Vec<A> w[FR];
#pragma GCC unroll 8
    for (int f = 0; f < FR; ++f) w[f] = load(weight + f * weight_stride + k);
#pragma GCC unroll 8
    for (int m = 0; m < MR; ++m) {
      const Vec<A> row = load(x + m * K + k);
#pragma GCC unroll 8
      for (int f = 0; f < FR; ++f) sums[m][f] += row * w[f];
    }
  }
  for (int m = 0; m < MR; ++m)
    for (int f = 0; f < FR; ++f) y[m][f] = sum_lanes<A>(sums[m][f]);
  for (; k < K; ++k)
    for (int m = 0; m < MR; ++m)
      for (int f = 0; f < FR; ++f) y[m][f] += x[m * K + k] * load_one(weight + f * weight_stride + k);
}

template <int MR, int FR, class A, class W, class Y>
void outputs(const LinearFewRows& a, const W* weight, Y* y, int64_t m, int64_t f, int64_t f_end) {
  const A* bias = static_cast<const A*>(a.bias);
  const A* x = static_cast<const A*>(a.x) + m * a.K;
  const auto store = [&](const auto& sums, int64_t f0, auto width) {
    for (int i = 0; i < MR; ++i)
      for (int j = 0; j < width(); ++j)
        store_one(y + (m + i) * a.F + f0 + j, bias ? sums[i][j] + bias[f0 + j] : sums[i][j]);
  };
  for (; f + FR <= f_end; f += FR) {
    A sums[MR][FR];
    tile<MR, FR>(x, weight + f * a.weight_stride, a.weight_stride, a.K, sums);
    store(sums, f, [] { return FR; });
  }
  for (; f < f_end; ++f) {
    A sums[MR][1];
    tile<MR, 1>(x, weight + f * a.weight_stride, a.weight_stride, a.K, sums);
    store(sums, f, [] { return 1; });
  }
}

template <class A>
void run(const LinearFewRows& a, int64_t begin, int64_t end) {
  with_type<A>(a.weight.dtype, a.weight.data, [&](const auto* weight) {
    with_type<A>(a.y.dtype, a.y.data, [&](auto* y) {
      for (int64_t item = begin; item < end; ++item) {
        const int64_t f = item * kLinearBlock, f_end = f + kLinearBlock < a.F ? f + kLinearBlock : a.F;
        int64_t m = 0;
        for (; m + 4 <= a.M; m += 4) outputs<4, 2, A>(a, weight, y, m, f, f_end);
        for (; m + 2 <= a.M; m += 2) outputs<2, 4, A>(a, weight, y, m, f, f_end);
        if (m < a.M) outputs<1, 4, A>(a, weight, y, m, f, f_end);
      }
    });
  });
}

}  // namespace

void linear_few_rows(const LinearFewRows& a, int64_t begin, int64_t end) {
  if (a.fp64) return run<double>(a, begin, end);
  run<float>(a, begin, end);
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
