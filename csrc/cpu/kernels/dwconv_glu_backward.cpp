#include "depthwise.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

// What one thread holds while it marches down a strip: three rows each of s = silu(u), of silu'(u) and of dc.
template <class A>
struct Rings {
  Rings(int64_t H, int64_t W) : s(H, W), slope(H, W), dc(H, W) {}
  Ring<A> s, slope, dc;
};

template <class A, class T>
void fill(const DwconvGluBackward& a, const DwconvGluItem& item, const T* u, int64_t y, Rings<A>& rings) {
  const T* row = u + item.b * a.u_stride_b + y * a.W * a.u_stride_n + item.channel;
  const int64_t F = a.F, stride = a.u_stride_n, vectors = item.vectors, count = item.count, pitch = rings.s.pitch();
  A *s = rings.s.target(y), *slope = rings.slope.target(y);
  for_each_run<4>(a.W, [&](auto run, int64_t x) SANA_EXT_LAMBDA_INLINE {
    constexpr int kPixels = decltype(run)::count;
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t v = 0; v < vectors; ++v) {
        Vec<A> values[kPixels];
        for (int p = 0; p < kPixels; ++p)
          values[p] = load_some<A>(row + (x + p) * stride + half * F + v * kLanes, count - v * kLanes);
        const Gate<A, kPixels> gate(values);
        const int64_t at = (half * vectors + v) * pitch + x * kLanes;
        for (int p = 0; p < kPixels; ++p) store(s + at + p * kLanes, gate.silu(p));
        for (int p = 0; p < kPixels; ++p) store(slope + at + p * kLanes, gate.slope(p));
      }
  });
}

// dc of row y: the convolution again, then the derivative of a * silu(g). Beside its first vector the rows of u and
// dout that the next step reads are fetched.
template <class A, class T>
void convolve(const DwconvGluBackward& a, const DwconvGluItem& item, const T* dout, const T* u, int64_t y, int64_t v,
              const PackedTaps<A>& taps, Rings<A>& rings) {
  const T* row = dout + item.b * a.dout_stride_b + y * a.W * a.dout_stride_n + item.channel + v * kLanes;
  const int64_t va = v, vg = item.vectors + v;
  A* dc_a = rings.dc.target(y) + va * rings.dc.pitch();
  A* dc_g = rings.dc.target(y) + vg * rings.dc.pitch();
  const Vec<A> bias_a = load(taps.vector(va) + 9 * kLanes), bias_g = load(taps.vector(vg) + 9 * kLanes);
  const int64_t stride = a.dout_stride_n, count = item.count - v * kLanes;
  const bool next_u = v == 0 && y + 2 < a.H && y + 1 <= item.last, next_dout = v == 0 && y + 1 < a.H && y < item.last;
  for_each_run<8>(a.W, [&](auto run, int64_t x) SANA_EXT_LAMBDA_INLINE {
    constexpr int kPixels = decltype(run)::count, kBatch = kPixels > 4 ? 4 : kPixels;
    for (int p = 0; p < kPixels; ++p) {
      if (next_u) prefetch_pixel(a, item, u, (y + 2) * a.W + x + p);
      if (next_dout) prefetch(row + (a.W + x + p) * stride, item.count);
    }
    Vec<A> c_a[kPixels], c_g[kPixels];
    for (int p = 0; p < kPixels; ++p) c_a[p] = bias_a, c_g[p] = bias_g;
    nine_taps(rings.s.around(y, va, x).row, taps.vector(va), c_a);
    nine_taps(rings.s.around(y, vg, x).row, taps.vector(vg), c_g);
    for (int p = 0; p < kPixels; p += kBatch) {
      Vec<A> values[kBatch];
      for (int i = 0; i < kBatch; ++i) values[i] = c_g[p + i];
      const Gate<A, kBatch> gate(values);
      for (int i = 0; i < kBatch; ++i) {
        const Vec<A> dh = load_some<A>(row + (x + p + i) * stride, count);
        store(dc_a + (x + p + i) * kLanes, dh * gate.silu(i));
        store(dc_g + (x + p + i) * kLanes, dh * c_a[p + i] * gate.slope(i));
      }
    }
  });
}

// sums[3 i + j] += sum over x of dc(y, x) * s(y + i - 1, x + j - 1); sums[9] += sum of dc. First the row, then the
// total: two levels keep the rounding error of large images down.
template <class A>
void accumulate(int64_t W, int64_t y, int64_t v, const Rings<A>& rings, A* sums) {
  Vec<A> total[10] = {};
  const A* dc = rings.dc.row(y, v) + kLanes;
  const auto s = rings.s.around(y, v, 0);
  int64_t x = 0;
  constexpr int kPixels = 4;
  for (; x + kPixels <= W; x += kPixels) {
    Vec<A> d[kPixels];
    for (int p = 0; p < kPixels; ++p) d[p] = load(dc + (x + p) * kLanes);
    for (int p = 0; p < kPixels; ++p) total[9] += d[p];
#pragma GCC unroll 16
    for (int column = 0; column < kPixels + 2; ++column)
#pragma GCC unroll 3
      for (int i = 0; i < 3; ++i) {
        const Vec<A> value = load(s.row[i] + (x + column) * kLanes);
        if (column < kPixels) total[3 * i] += d[column] * value;
        if (column >= 1 && column <= kPixels) total[3 * i + 1] += d[column - 1] * value;
        if (column >= 2) total[3 * i + 2] += d[column - 2] * value;
      }
  }
  for (; x < W; ++x) {
    const Vec<A> d = load(dc + x * kLanes);
    total[9] += d;
    for (int i = 0; i < 3; ++i)
      for (int j = 0; j < 3; ++j) total[3 * i + j] += d * load(s.row[i] + (x + j) * kLanes);
  }
  for (int k = 0; k < 10; ++k) store(sums + k * kLanes, load(sums + k * kLanes) + total[k]);
}

// du of row y for vector v of both halves.
template <class A, class T>
void propagate(const DwconvGluBackward& a, const DwconvGluItem& item, T* du, int64_t y, int64_t v,
               const PackedTaps<A>& taps, const Rings<A>& rings, bool streaming) {
  const int64_t half = v / item.vectors, first = v % item.vectors * kLanes;
  T* row = du + (item.b * a.H + y) * a.W * 2 * a.F + half * a.F + item.channel + first;
  const A* slope = rings.slope.row(y, v) + kLanes;
  const int64_t stride = 2 * a.F, count = item.count - first;
  for_each_run<8>(a.W, [&](auto run, int64_t x) SANA_EXT_LAMBDA_INLINE {
    constexpr int kPixels = decltype(run)::count;
    Vec<A> ds[kPixels] = {};
    nine_taps<true>(rings.dc.around(y, v, x).row, taps.vector(v), ds);
    for (int p = 0; p < kPixels; ++p)
      store_some<A>(row + (x + p) * stride, ds[p] * load(slope + (x + p) * kLanes), count, streaming);
  });
}

template <class A, class T>
void backward(const DwconvGluBackward& a, const T* u, int64_t begin, int64_t end) {
  const T* dout = static_cast<const T*>(a.dout.data);
  T* du = static_cast<T*>(a.du.data);
  PackedTaps<A> taps;
  Rings<A> rings(a.H, a.W);
  const bool streaming = streams(a.du, a.F, 2 * a.B * a.H * a.W * a.F);
  Scratch<A> sums(a.partial != nullptr ? kMaxVectors * 10 * kLanes : 0);
  for (int64_t index = begin; index < end; ++index) {
    const DwconvGluItem item(a, index);
    const int64_t vectors = 2 * item.vectors;
    taps.pack(a.weight, a.bias, a.F, item);
    if (a.partial != nullptr) zero(sums.data(), vectors * 10 * kLanes);
    for (int64_t y = item.first < 2 ? 0 : item.first - 2; y <= item.first && item.first < item.last; ++y)
      fill(a, item, u, y, rings);
    // Row y of dc needs rows y - 1 to y + 1 of s; row y - 1 of du needs rows y - 2 to y of dc.
    for (int64_t y = item.first < 1 ? 0 : item.first - 1; y <= item.last && item.first < item.last; ++y) {
      if (y + 1 > item.first && y + 1 < a.H) fill(a, item, u, y + 1, rings);
      for (int64_t v = 0; v < item.vectors; ++v) {
        if (y < a.H) convolve(a, item, dout, u, y, v, taps, rings);
        for (int64_t both = v; both < vectors; both += item.vectors) {
          if (a.partial != nullptr && y >= item.first && y < item.last)
            accumulate(a.W, y, both, rings, sums.data() + both * 10 * kLanes);
          if (y > item.first) propagate(a, item, du, y - 1, both, taps, rings, streaming);
        }
      }
    }
    if (a.partial == nullptr) continue;
    const int64_t part = index / ((a.F + kDwconvGluChannels - 1) / kDwconvGluChannels);
    for (int64_t v = 0; v < vectors; ++v) {
      const int64_t half = v / item.vectors, first = v % item.vectors * kLanes;
      A* partial = static_cast<A*>(a.partial) + part * 20 * a.F + half * a.F + item.channel + first;
      for (int k = 0; k < 10; ++k)
        store_some<A>(partial + k * 2 * a.F, load(sums.data() + (v * 10 + k) * kLanes), item.count - first);
    }
  }
  if (streaming) stream_fence();
}

template <class A>
void reduce(const DwconvGluReduce& a, int64_t begin, int64_t end) {
  Scratch<A> total(kDwconvGluChannels);
  for (int64_t block = begin; block < end; ++block) {
    const int64_t first = block * kDwconvGluChannels;
    const int64_t count = a.channels - first < kDwconvGluChannels ? a.channels - first : kDwconvGluChannels;
    for (int64_t k = 0; k < 10; ++k) {
      zero(total.data(), count);
      for (int64_t part = 0; part < a.parts; ++part) {
        const A* values = static_cast<const A*>(a.partial) + (part * 10 + k) * a.channels + first;
        for_each(count, [&](auto lanes, int64_t c) {
          lanes.store(total.data() + c, lanes.load(total.data() + c) + lanes.load(values + c));
        });
      }
      const Ptr out = k < 9 ? a.dweight : a.dbias;
      if (!out) continue;
      with_type<A>(out.dtype, out.data, [&](auto* p) {
        for (int64_t c = 0; c < count; ++c) store_one(k < 9 ? p + (first + c) * 9 + k : p + first + c, total[c]);
      });
    }
  }
}

}  // namespace

void dwconv_glu_backward(const DwconvGluBackward& a, int64_t begin, int64_t end) {
  if (a.u.dtype == Dtype::kFloat64)
    backward<double>(a, static_cast<const double*>(a.u.data), begin, end);
  else
    with_type<float>(a.u.dtype, a.u.data, [&](const auto* u) { backward<float>(a, u, begin, end); });
}

void dwconv_glu_reduce(const DwconvGluReduce& a, int64_t begin, int64_t end) {
  a.dweight.dtype == Dtype::kFloat64 ? reduce<double>(a, begin, end) : reduce<float>(a, begin, end);
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
