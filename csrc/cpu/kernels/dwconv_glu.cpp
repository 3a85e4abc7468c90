#include "dwconv_glu.h"

#include "depthwise.h"

namespace sana_ext::cpu::SANA_EXT_ISA {
namespace {

template <class A, class T>
void fill(const DwconvGluForward& a, const DwconvGluItem& item, const T* u, int64_t y, Ring<A>& ring) {
  const T* row = u + item.b * a.u_stride_b + y * a.W * a.u_stride_n + item.channel;
  const int64_t F = a.F, stride = a.u_stride_n, vectors = item.vectors, count = item.count, pitch = ring.pitch();
  A* target = ring.target(y);
  for_each_run<4>(a.W, [&](auto run, int64_t x) SANA_EXT_LAMBDA_INLINE {
    constexpr int kPixels = decltype(run)::count;
    for (int64_t half = 0; half < 2; ++half)
      for (int64_t v = 0; v < vectors; ++v) {
        Vec<A> values[kPixels];
        for (int p = 0; p < kPixels; ++p)
          values[p] = load_some<A>(row + (x + p) * stride + half * F + v * kLanes, count - v * kLanes);
        const Gate<A, kPixels> gate(values);
        for (int p = 0; p < kPixels; ++p) store(target + (half * vectors + v) * pitch + (x + p) * kLanes, gate.silu(p));
      }
  });
}

template <class A, class T>
void forward(const DwconvGluForward& a, const T* u, int64_t begin, int64_t end) {
  PackedTaps<A> taps;
  Ring<A> ring(a.H, a.W);
  const bool streaming = streams(a.out, a.F, a.B * a.H * a.W * a.F);
  for (int64_t index = begin; index < end; ++index) {
    const DwconvGluItem item(a, index);
    const int64_t F = a.F, vectors = item.vectors, count = item.count;
    taps.pack(a.weight, a.bias, a.F, item);
    if (item.first > 0) fill(a, item, u, item.first - 1, ring);
    if (item.first < item.last) fill(a, item, u, item.first, ring);
    for (int64_t y = item.first; y < item.last; ++y) {
      if (y + 1 < a.H) fill(a, item, u, y + 1, ring);
      const bool more = y + 2 < a.H && y + 1 < item.last;
      T* out = static_cast<T*>(a.out.data) + (item.b * a.H + y) * a.W * a.F + item.channel;
      for_each_run<8>(a.W, [&](auto run, int64_t x) SANA_EXT_LAMBDA_INLINE {
        constexpr int kPixels = decltype(run)::count, kBatch = kPixels > 4 ? 4 : kPixels;
        if (more)
          for (int p = 0; p < kPixels; ++p) prefetch_pixel(a, item, u, (y + 2) * a.W + x + p);
        for (int64_t v = 0; v < vectors; ++v) {
          Vec<A> c_a[kPixels], c_g[kPixels];
          const A *taps_a = taps.vector(v), *taps_g = taps.vector(vectors + v);
          for (int p = 0; p < kPixels; ++p) c_a[p] = load(taps_a + 9 * kLanes), c_g[p] = load(taps_g + 9 * kLanes);
          nine_taps(ring.around(y, v, x).row, taps_a, c_a);
          nine_taps(ring.around(y, vectors + v, x).row, taps_g, c_g);
          for (int p = 0; p < kPixels; p += kBatch) {
            Vec<A> values[kBatch];
            for (int i = 0; i < kBatch; ++i) values[i] = c_g[p + i];
            const Gate<A, kBatch> gate(values);
            for (int i = 0; i < kBatch; ++i)
              store_some<A>(out + (x + p + i) * F + v * kLanes, c_a[p + i] * gate.silu(i), count - v * kLanes,
                            streaming);
          }
        }
      });
    }
  }
  if (streaming) stream_fence();
}

}  // namespace

void dwconv_glu_forward(const DwconvGluForward& a, int64_t begin, int64_t end) {
  if (a.u.dtype == Dtype::kFloat64)
    forward<double>(a, static_cast<const double*>(a.u.data), begin, end);
  else
    with_type<float>(a.u.dtype, a.u.data, [&](const auto* u) { forward<float>(a, u, begin, end); });
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
