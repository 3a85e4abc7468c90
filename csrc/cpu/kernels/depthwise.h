// Parts of the dwconv_glu kernels: taps packed by vector, rings of image rows, and the nine-tap sum over a run of
// pixels. Included by kernel files only (see vec.h).
#pragma once
#include "dwconv_glu.h"
#include "stream.h"
#include "vec.h"

namespace sana_ext::cpu::SANA_EXT_ISA {

// `count` elements as a vector, zeros after them; and the reverse.
template <class A, class T>
SANA_EXT_INLINE Vec<A> load_some(const T* p, int64_t count) {
  if (count >= kLanes) return load(p);
  Vec<A> v{};
  for (int64_t i = 0; i < count; ++i) v[i] = load_one(p + i);
  return v;
}
template <class A, class T>
SANA_EXT_INLINE void store_some(T* p, Vec<A> v, int64_t count) {
  if (count >= kLanes) return store(p, v);
  for (int64_t i = 0; i < count; ++i) store_one(p + i, v[i]);
}

// Stores by streaming if `streaming`, which asks for whole vectors (see stream.h).
template <class A, class T>
SANA_EXT_INLINE void store_some(T* p, Vec<A> v, int64_t count, bool streaming) {
  streaming ? stream(p, v) : store_some<A>(p, v, count);
}

// Asks for the cache lines of `count` elements: pixels are kilobytes apart, which the hardware does not foresee.
template <class T>
SANA_EXT_INLINE void prefetch(const T* p, int64_t count) {
  for (int64_t c = 0; c < count; c += 64 / static_cast<int64_t>(sizeof(T))) __builtin_prefetch(p + c);
}

// v, and NaN where the mask is -1.
SANA_EXT_INLINE Vec<float> nan_where(Vec<int32_t> mask, Vec<float> v) {
  return reinterpret_cast<Vec<float>>(reinterpret_cast<Vec<int32_t>>(v) | mask);
}

// SiLU of n vectors. x is held where its sigmoid is not yet rounded away: beyond it the float product x * sigmoid(x)
// would leave zero again. SiLU of -infinity is NaN, as in torch: an overflow must not end as 0.
template <class A, int n>
struct Gate {
  Vec<A> x[n], sigma[n];
  SANA_EXT_INLINE explicit Gate(const Vec<A> (&values)[n]) {
    for (int i = 0; i < n; ++i)
      if constexpr (sizeof(A) == 4)
        x[i] = nan_where(values[i] == -HUGE_VALF, at_least(values[i], -88.0f));
      else
        x[i] = values[i];
    sigmoid(x, sigma);
  }
  SANA_EXT_INLINE Vec<A> silu(int i) const { return x[i] * sigma[i]; }
  SANA_EXT_INLINE Vec<A> slope(int i) const { return sigma[i] * (x[i] * (A(1) - sigma[i]) + A(1)); }  // of silu
};

// One work item: image b, rows [first, last), channels [channel, channel + count) of each half, in `vectors` vectors.
struct DwconvGluItem {
  int64_t b, first, last, channel, count, vectors;

  template <class Args>
  DwconvGluItem(const Args& a, int64_t item) {
    const int64_t blocks = (a.F + kDwconvGluChannels - 1) / kDwconvGluChannels;
    const int64_t strip = item / blocks % a.strips, rows = (a.H + a.strips - 1) / a.strips;
    b = item / blocks / a.strips;
    first = strip * rows < a.H ? strip * rows : a.H;
    last = first + rows < a.H ? first + rows : a.H;
    channel = item % blocks * kDwconvGluChannels;
    count = a.F - channel < kDwconvGluChannels ? a.F - channel : kDwconvGluChannels;
    vectors = (count + kLanes - 1) / kLanes;
  }
};

constexpr int64_t kMaxVectors = 2 * kDwconvGluChannels / kLanes;  // of both halves

// The same for both halves of pixel n of u.
template <class Args, class T>
SANA_EXT_INLINE void prefetch_pixel(const Args& a, const DwconvGluItem& item, const T* u, int64_t n) {
  const T* pixel = u + item.b * a.u_stride_b + n * a.u_stride_n + item.channel;
  prefetch(pixel, item.count);
  prefetch(pixel + a.F, item.count);
}

// Taps and bias of an item's channels: for each half and vector nine vectors of taps and one of the bias.
template <class A>
class PackedTaps {
 public:
  PackedTaps() : data_(kMaxVectors * 10 * kLanes) {}

  void pack(ConstPtr weight, ConstPtr bias, int64_t F, const DwconvGluItem& item) {
    zero(data_.data(), 2 * item.vectors * 10 * kLanes);
    for (int64_t half = 0; half < 2; ++half) {
      const int64_t first = half * F + item.channel;
      with_type<A>(weight.dtype, weight.data, [&](const auto* w) {
        for (int64_t c = 0; c < item.count; ++c)
          for (int64_t tap = 0; tap < 9; ++tap) at(item, half, c, tap) = load_one(w + (first + c) * 9 + tap);
      });
      if (!bias) continue;
      with_type<A>(bias.dtype, bias.data, [&](const auto* p) {
        for (int64_t c = 0; c < item.count; ++c) at(item, half, c, 9) = load_one(p + first + c);
      });
    }
  }

  // v counts the vectors of both halves: those of a, then those of g.
  SANA_EXT_INLINE const A* vector(int64_t v) const { return data_.data() + v * 10 * kLanes; }

 private:
  A& at(const DwconvGluItem& item, int64_t half, int64_t c, int64_t tap) {
    return data_[((half * item.vectors + c / kLanes) * 10 + tap) * kLanes + c % kLanes];
  }

  Scratch<A> data_;
};

// Three rows of an image, each [2 * vectors][W + 2][kLanes] with a column of zeros on either side. Rows outside the
// image are zeros too. Row y lives until row y + 3 is written.
template <class A>
class Ring {
 public:
  Ring(int64_t H, int64_t W)
      : H_(H), pitch_((W + 2) * kLanes), row_(kMaxVectors * pitch_), data_(3 * row_), zeros_(pitch_) {
    zero(zeros_.data(), pitch_);
    for (int64_t i = 0; i < 3 * kMaxVectors; ++i) {
      zero(data_.data() + i * pitch_, kLanes);
      zero(data_.data() + (i + 1) * pitch_ - kLanes, kLanes);
    }
  }

  // Column -1 of row y, vector v; consecutive columns are kLanes apart.
  SANA_EXT_INLINE const A* row(int64_t y, int64_t v) const {
    return y < 0 || y >= H_ ? zeros_.data() : data_.data() + y % 3 * row_ + v * pitch_;
  }
  // The rows above, at and below y from column x - 1 on.
  struct Three {
    const A* row[3];
  };
  SANA_EXT_INLINE Three around(int64_t y, int64_t v, int64_t x) const {
    return {{row(y - 1, v) + x * kLanes, row(y, v) + x * kLanes, row(y + 1, v) + x * kLanes}};
  }
  // Column 0 of row y, to be written; vectors are pitch() apart.
  SANA_EXT_INLINE A* target(int64_t y) { return data_.data() + y % 3 * row_ + kLanes; }
  SANA_EXT_INLINE int64_t pitch() const { return pitch_; }

 private:
  int64_t H_, pitch_, row_;
  Scratch<A> data_, zeros_;
};

// The nine-tap sums of kPixels neighbouring pixels: sum[p] += sum over i, j of taps[3 i + j] * rows[i][p + j]. Each
// row's values are loaded once; the order of the additions is the same for every pixel. kFlip takes the taps in
// reverse.
template <bool kFlip = false, int kPixels, class V, class A>
SANA_EXT_INLINE void nine_taps(const A* const (&rows)[3], const A* taps, V (&sum)[kPixels]) {
#pragma GCC unroll 3
  for (int i = 0; i < 3; ++i) {
    const auto tap = [&](int j) { return load(taps + (kFlip ? 8 - 3 * i - j : 3 * i + j) * kLanes); };
    const Vec<A> w0 = tap(0), w1 = tap(1), w2 = tap(2);
#pragma GCC unroll 16
    for (int x = 0; x < kPixels + 2; ++x) {
      const Vec<A> s = load(rows[i] + x * kLanes);
      if (x < kPixels) sum[x] += w0 * s;
      if (x >= 1 && x <= kPixels) sum[x - 1] += w1 * s;
      if (x >= 2) sum[x - 2] += w2 * s;
    }
  }
}

// Calls body(Pixels<n>{}, x) for runs of n pixels, n = kPixels or 1, that cover [0, W).
template <int n>
struct Pixels {
  static constexpr int count = n;
};
template <int kPixels, class Body>
SANA_EXT_INLINE void for_each_run(int64_t W, const Body& body) {
  int64_t x = 0;
  for (; x + kPixels <= W; x += kPixels) body(Pixels<kPixels>{}, x);
  for (; x < W; ++x) body(Pixels<1>{}, x);
}

}  // namespace sana_ext::cpu::SANA_EXT_ISA
