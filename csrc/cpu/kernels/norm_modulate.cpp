#include "norm_modulate.h"

#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

// A [B, C] row of per-image coefficients held as accumulators while the rows of one image pass by.
template <class A> class Coefficients {
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

template <class A> void forward(const NormModulateForward& a, int64_t begin, int64_t end) {
  const int64_t C = a.C;
  Scratch<A> x_scratch(C), y_scratch(a.y ? C : 0), z_scratch(C), n_scratch(C);
  Coefficients<A> gates(a.gate, a.gate_stride_b, C), shifts(a.shift, a.shift_stride_b, C), scales(a.scale, a.scale_stride_b, C);
  for (int64_t row = begin; row < end; ++row) {
    const int64_t b = row / a.N, i_n = row % a.N;
    const A* z = load_row<A>(a.x, b * a.x_stride_b + i_n * a.x_stride_n, C, x_scratch.data());
    if (a.y) {
      const A* x = z;
      const A* y = load_row<A>(a.y, b * a.y_stride_b + i_n * a.y_stride_n, C, y_scratch.data());
      const A* gate = gates.row(b);
      A* sum = z_scratch.data();
      if (gate != nullptr)
        for_each(C, [&](auto v, int64_t c) { v.store(sum + c, v.load(gate + c) * v.load(y + c) + v.load(x + c)); });
      else
        for_each(C, [&](auto v, int64_t c) { v.store(sum + c, v.load(y + c) + v.load(x + c)); });
      store_row<A>(a.z, row * C, C, sum);
      z = load_row<A>(a.z, row * C, C, sum);  // normalise what the next layer will see: z rounded to its own type
    }
    if (!a.n) continue;
    Sum<A> total, squares;
    for_each(C, [&](auto v, int64_t c) { total.add(v.load(z + c)); });
    const A mean = total.total() / A(C);
    for_each(C, [&](auto v, int64_t c) {
      const auto d = v.load(z + c) - mean;
      squares.add(d * d);
    });
    const A rstd = A(1) / std::sqrt(squares.total() / A(C) + A(a.eps));
    const A *scale = scales.row(b), *shift = shifts.row(b);
    A* n = n_scratch.data();
    for_each(C, [&](auto v, int64_t c) {
      v.store(n + c, (v.load(z + c) - mean) * rstd * (v.load(scale + c) + A(1)) + v.load(shift + c));
    });
    store_row<A>(a.n, row * C, C, n);
    static_cast<A*>(a.mean)[row] = mean;
    static_cast<A*>(a.rstd)[row] = rstd;
  }
}

template <class A> void backward(const NormModulateBackward& a, int64_t begin, int64_t end) {
  const int64_t C = a.C, blocks = (a.N + kNormModulateBlock - 1) / kNormModulateBlock;
  Scratch<A> dz_scratch(C), dn_scratch(C), z_scratch(C), y_scratch(C), total_scratch(C), dy_scratch(C);
  Coefficients<A> gates(a.gate, a.gate_stride_b, C), scales(a.scale, a.scale_stride_b, C);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t b = block / blocks, first = block % blocks * kNormModulateBlock;
    const int64_t last = first + kNormModulateBlock < a.N ? first + kNormModulateBlock : a.N;
    A* dshift = static_cast<A*>(a.partial) + block * 3 * C;
    A *dscale = dshift + C, *dgate = dscale + C;
    zero(dshift, 3 * C);
    const A *gate = gates.row(b), *scale = scales.row(b);
    for (int64_t i_n = first; i_n < last; ++i_n) {
      const int64_t row = b * a.N + i_n;
      const A* dz = a.dz ? load_row<A>(a.dz, b * a.dz_stride_b + i_n * a.dz_stride_n, C, dz_scratch.data()) : nullptr;
      const A* total = dz;
      if (a.dn) {
        const A* dn = load_row<A>(a.dn, b * a.dn_stride_b + i_n * a.dn_stride_n, C, dn_scratch.data());
        const A* z = load_row<A>(a.z, b * a.z_stride_b + i_n * a.z_stride_n, C, z_scratch.data());
        const A mean = static_cast<const A*>(a.mean)[row], rstd = static_cast<const A*>(a.rstd)[row];
        Sum<A> sum_g, sum_gx;
        A* out = total_scratch.data();  // first g, rounded, so that g - mean(g) cancels exactly; then dz_total
        for_each(C, [&](auto v, int64_t c) {
          const auto d = v.load(dn + c), xhat = (v.load(z + c) - mean) * rstd, g = d * (v.load(scale + c) + A(1));
          v.store(out + c, g);
          sum_g.add(g);
          sum_gx.add(g * xhat);
          v.store(dshift + c, v.load(dshift + c) + d);
          v.store(dscale + c, v.load(dscale + c) + d * xhat);
        });
        const A mean_g = sum_g.total() / A(C), mean_gx = sum_gx.total() / A(C);
        for_each(C, [&](auto v, int64_t c) {
          const auto xhat = (v.load(z + c) - mean) * rstd;
          auto dx = (v.load(out + c) - mean_g - xhat * mean_gx) * rstd;
          if (dz != nullptr) dx += v.load(dz + c);
          v.store(out + c, dx);
        });
        total = out;
      }
      if (a.dx) store_row<A>(a.dx, row * C, C, total);
      if (gate == nullptr) {
        if (a.dy) store_row<A>(a.dy, row * C, C, total);
        continue;
      }
      const A* y = load_row<A>(a.y, b * a.y_stride_b + i_n * a.y_stride_n, C, y_scratch.data());
      A* dy = dy_scratch.data();
      for_each(C, [&](auto v, int64_t c) {
        const auto d = v.load(total + c);
        v.store(dy + c, d * v.load(gate + c));
        v.store(dgate + c, v.load(dgate + c) + d * v.load(y + c));
      });
      if (a.dy) store_row<A>(a.dy, row * C, C, dy);
    }
  }
}

template <class A> void reduce(const PartialSums& a, int64_t begin, int64_t end) {
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
