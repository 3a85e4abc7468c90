#include "norm_modulate.h"

#include <type_traits>

#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

// A [B, C] row of per-image coefficients held as accumulators while the rows of one image pass by.
template <class A>
class Coefficients {
 public:
  Coefficients(ConstPtr p, int64_t stride_b, int64_t C) : p_(p), stride_b_(stride_b), C_(C), scratch_(p ? C : 0) {}
  const A* row(int64_t b) {
    if (!p_) return nullptr;
    if (b != b_) row_ = load_row<A>(p_, (b_ = b) * stride_b_, C_, scratch_.data());
    return row_;
  }

 private:
  ConstPtr p_;
  int64_t stride_b_, C_, b_ = -1;
  Scratch<A> scratch_;
  const A* row_ = nullptr;
};

// Row `offset` of a tensor of accumulators or 16-bit elements, as the typed pointer that `with_type` hands out.
template <class A, class F>
SANA_EXT_INLINE void on_row(ConstPtr p, int64_t offset, const F& f) {
  with_type<A>(p.dtype, static_cast<const char*>(p.data) + offset * size_of(p.dtype), f);
}
template <class A, class F>
SANA_EXT_INLINE void on_row(Ptr p, int64_t offset, const F& f) {
  with_type<A>(p.dtype, static_cast<char*>(p.data) + offset * size_of(p.dtype), f);
}

// A row's mean before its second pass. Sums run over the distances from `first`, the row's first value: exact for a row
// of equal values, and without cancellation for one that lies far from zero.
template <class A>
struct Mean {
  A first;
  Sum<A> distances;
  explicit Mean(A value) : first(value) {}
  A of(int64_t C) const { return first + distances.total() / A(C); }
};

// z = x + gate * y, stored in x's type; returns the mean of z as stored, and z itself in `copy`.
template <class A, class T>
A add_residual(const T* x, const A* y, const A* gate, T* z, A* copy, int64_t C) {
  store_one(z, gate != nullptr ? gate[0] * y[0] + load_one(x) : y[0] + load_one(x));
  Mean<A> mean(load_one(z));
  const auto put = [&](auto v, int64_t c, auto slot, auto value) SANA_EXT_LAMBDA_INLINE {
    v.store(z + c, value);
    const auto stored = v.load(z + c);  // what the next layer will see: rounded to z's own type
    if constexpr (sizeof(T) == 2) v.store(copy + c, stored);
    mean.distances.add(stored - mean.first, slot);
  };
  if (gate != nullptr)
    for_each_slot(
        C, [&](auto v, int64_t c, auto slot) { put(v, c, slot, v.load(gate + c) * v.load(y + c) + v.load(x + c)); });
  else
    for_each_slot(C, [&](auto v, int64_t c, auto slot) { put(v, c, slot, v.load(y + c) + v.load(x + c)); });
  return mean.of(C);
}

template <class A>
void forward(const NormModulateForward& a, int64_t begin, int64_t end) {
  const int64_t C = a.C;
  Scratch<A> copy(C), y_scratch(a.y ? C : 0);
  Coefficients<A> gates(a.gate, a.gate_stride_b, C), shifts(a.shift, a.shift_stride_b, C),
      scales(a.scale, a.scale_stride_b, C);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, i_n = row % a.N;
    const A* z = copy.data();  // the row that is normalised
    A mean = 0;
    on_row<A>(a.x, b * a.x_stride_b + i_n * a.x_stride_n, [&](const auto* x) {
      using T = std::remove_const_t<std::remove_pointer_t<decltype(x)>>;
      if (a.y) {
        const A* y = load_row<A>(a.y, b * a.y_stride_b + i_n * a.y_stride_n, C, y_scratch.data());
        T* stored = static_cast<T*>(a.z.data) + row * C;
        mean = add_residual(x, y, gates.row(b), stored, copy.data(), C);
        if constexpr (sizeof(T) == sizeof(A)) z = stored;
        return;
      }
      Mean<A> of_row(load_one(x));
      for_each_slot(C, [&](auto v, int64_t c, auto slot) {
        const auto value = v.load(x + c);
        if constexpr (sizeof(T) != sizeof(A)) v.store(copy.data() + c, value);
        of_row.distances.add(value - of_row.first, slot);
      });
      mean = of_row.of(C);
      if constexpr (sizeof(T) == sizeof(A)) z = x;
    });
    if (!a.n) continue;
    Sum<A> squares, rests;
    for_each_slot(C, [&](auto v, int64_t c, auto slot) {
      const auto d = v.load(z + c) - mean;
      squares.add(d * d, slot);
      rests.add(d, slot);
    });
    const A rest = rests.total() / A(C);  // what rounding left out of the mean
    const A variance = squares.total() / A(C) - rest * rest;
    const A rstd = A(1) / std::sqrt((variance < A(0) ? A(0) : variance) + A(a.eps));
    const A *scale = scales.row(b), *shift = shifts.row(b);
    on_row<A>(a.n, row * C, [&](auto* n) {
      for_each(C, [&](auto v, int64_t c) {
        v.store(n + c, (v.load(z + c) - mean - rest) * rstd * (v.load(scale + c) + A(1)) + v.load(shift + c));
      });
    });
    static_cast<A*>(a.mean)[row] = mean + rest;
    static_cast<A*>(a.rstd)[row] = rstd;
  }
}

// One row of the LayerNorm's gradient: g = dn * (1 + scale) into `g_row`, the sums of dshift and dscale, then
// dz_total = dz + rstd * (g - mean(g) - xhat * mean(g * xhat)) over it.
template <class A>
void norm_backward_row(const A* dn, const A* z, const A* scale, const A* dz, A mean, A rstd, A* g_row, A* dshift,
                       A* dscale, int64_t C) {
  Sum<A> sum_g, sum_gx;
  for_each_slot(C, [&](auto v, int64_t c, auto slot) {
    const auto d = v.load(dn + c), xhat = (v.load(z + c) - mean) * rstd, g = d * (v.load(scale + c) + A(1));
    v.store(g_row + c, g);  // rounded, so that g - mean(g) cancels exactly where it must
    sum_g.add(g, slot);
    sum_gx.add(g * xhat, slot);
    v.store(dshift + c, v.load(dshift + c) + d);
    v.store(dscale + c, v.load(dscale + c) + d * xhat);
  });
  const A mean_g = sum_g.total() / A(C), mean_gx = sum_gx.total() / A(C);
  const auto gradient = [&](auto v, int64_t c) SANA_EXT_LAMBDA_INLINE {
    return (v.load(g_row + c) - mean_g - (v.load(z + c) - mean) * rstd * mean_gx) * rstd;
  };
  if (dz != nullptr)
    for_each(C, [&](auto v, int64_t c) { v.store(g_row + c, gradient(v, c) + v.load(dz + c)); });
  else
    for_each(C, [&](auto v, int64_t c) { v.store(g_row + c, gradient(v, c)); });
}

template <class A>
void backward(const NormModulateBackward& a, int64_t begin, int64_t end) {
  const int64_t C = a.C, blocks = (a.N + kNormModulateBlock - 1) / kNormModulateBlock;
  Scratch<A> dz_scratch(C), dn_scratch(C), z_scratch(C), y_scratch(C), total_scratch(C);
  Coefficients<A> gates(a.gate, a.gate_stride_b, C), scales(a.scale, a.scale_stride_b, C);
  const bool dx_is_accumulator = a.dx && size_of(a.dx.dtype) == static_cast<int64_t>(sizeof(A));
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks, first = block % blocks * kNormModulateBlock;
    const int64_t last = first + kNormModulateBlock < a.N ? first + kNormModulateBlock : a.N;
    A* dshift = static_cast<A*>(a.partial) + block * 3 * C;
    A *dscale = dshift + C, *dgate = dscale + C;
    if (a.dn) zero(dshift, 2 * C);
    if (a.gate) zero(dgate, C);
    const A *gate = gates.row(b), *scale = scales.row(b);
    for (int64_t i_n = first; i_n < last; ++i_n) {
      const int64_t row = b * a.N + i_n;
      const A* dz = a.dz ? load_row<A>(a.dz, b * a.dz_stride_b + i_n * a.dz_stride_n, C, dz_scratch.data()) : nullptr;
      const A* total = dz;
      if (a.dn) {
        const A* dn = load_row<A>(a.dn, b * a.dn_stride_b + i_n * a.dn_stride_n, C, dn_scratch.data());
        const A* z = load_row<A>(a.z, b * a.z_stride_b + i_n * a.z_stride_n, C, z_scratch.data());
        A* out = dx_is_accumulator ? static_cast<A*>(a.dx.data) + row * C : total_scratch.data();
        norm_backward_row<A>(dn, z, scale, dz, static_cast<const A*>(a.mean)[row], static_cast<const A*>(a.rstd)[row],
                             out, dshift, dscale, C);
        total = out;
      }
      if (a.dx && !(a.dn && dx_is_accumulator)) store_row<A>(a.dx, row * C, C, total);
      if (gate == nullptr) {
        if (a.dy) store_row<A>(a.dy, row * C, C, total);
        continue;
      }
      const A* y = load_row<A>(a.y, b * a.y_stride_b + i_n * a.y_stride_n, C, y_scratch.data());
      on_row<A>(a.dy, row * C, [&](auto* dy) {
        for_each(C, [&](auto v, int64_t c) {
          const auto d = v.load(total + c);
          v.store(dy + c, d * v.load(gate + c));
          v.store(dgate + c, v.load(dgate + c) + d * v.load(y + c));
        });
      });
    }
  }
}

template <class A>
void reduce(const PartialSums& a, int64_t begin, int64_t end) {
  Scratch<A> sum(a.C);
  for (int64_t item = begin; item < end; ++item) {
    const int64_t b = item / a.R, r = item % a.R;
    if (!a.out[r]) continue;
    zero(sum.data(), a.C);
    for (int64_t block = 0; block < a.blocks; ++block) {
      const A* part = static_cast<const A*>(a.partial) + ((b * a.blocks + block) * a.R + r) * a.C;
      for_each(a.C, [&](auto v, int64_t c) { v.store(sum.data() + c, v.load(sum.data() + c) + v.load(part + c)); });
    }
    store_row<A>(a.out[r], b * a.C, a.C, sum.data());
  }
}

}  // namespace

void norm_modulate_forward(const NormModulateForward& a, int64_t begin, int64_t end) {
  a.x.dtype == Dtype::kFloat64 ? forward<double>(a, begin, end) : forward<float>(a, begin, end);
}

void norm_modulate_backward(const NormModulateBackward& a, int64_t begin, int64_t end) {
  a.fp64 ? backward<double>(a, begin, end) : backward<float>(a, begin, end);
}

void sum_partials(const PartialSums& a, int64_t begin, int64_t end) {
  a.fp64 ? reduce<double>(a, begin, end) : reduce<float>(a, begin, end);
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
