// Parts of the dwconv_glu kernels: SiLU, a block's place in the image, its channels' taps, and the copies of image rows
// into shared memory.
#pragma once
#include "dwconv_glu.h"
#include "primitives.cuh"

namespace sana_ext::cuda {

constexpr int kRun = kDwconvGluRun;
constexpr int kThreads = kDwconvGluWarps * kWarpSize;
constexpr float kLog2E = 1.4426950408889634f;

// silu(x) = x * sigmoid(x) and its derivative, as exactly as a tensor of T can tell. bf16: sigmoid(x) =
// (1 + tanh(x / 2)) / 2 by the hardware's tanh, one instruction of the slow special function unit in place of two.
struct Silu {
  float value, slope;
};

template <class T>
__device__ inline float sigmoid(float x) {
  return reciprocal_approx(1.0f + exp2_approx(-kLog2E * x));
}
template <>
__device__ inline float sigmoid<float>(float x) {
  return reciprocal_approx(1.0f + expf(-x));
}

template <class T>
__device__ inline float silu(float x) {
  return x * sigmoid<T>(x);
}
template <>
__device__ inline float silu<BFloat16>(float x) {
  const float half = 0.5f * x;
  return half * tanh_approx(half) + half;
}

template <class T>
__device__ inline Silu silu_and_slope(float x) {
  const float sigma = sigmoid<T>(x), value = x * sigma;
  return {value, sigma * (x - value) + sigma};
}
template <>
__device__ inline Silu silu_and_slope<BFloat16>(float x) {
  const float half = 0.5f * x, t = tanh_approx(half), sigma = 0.5f * t + 0.5f, value = half * t + half;
  return {value, sigma * (x - value) + sigma};
}

// Image b, rows [first, last), columns from x on, channels from `channel` on of each half.
struct DwconvGluPlace {
  int64_t b, channel, part;  // part: number of the block among those of its channels
  int first, last, x;

  __device__ DwconvGluPlace(const DwconvGluCut& cut, int64_t H, int channels) {
    const int64_t block = blockIdx.x;
    channel = block % cut.groups * channels;
    part = block / cut.groups;
    x = static_cast<int>(part % cut.tiles * cut.warps * kRun);
    const int64_t strip = part / cut.tiles % cut.strips, end = (strip + 1) * cut.rows;
    b = part / cut.tiles / cut.strips;
    first = static_cast<int>(strip * cut.rows);
    last = static_cast<int>(end < H ? end : H);
  }
};

// Nine taps and the bias of kLane neighbouring channels; zeros for those beyond the F of their half.
template <int kLane>
struct Taps {
  float tap[9][kLane], bias[kLane];

  // `channel` counts the channels of both halves; `inside` of the kLane exist.
  __device__ void load(ConstPtr weight, ConstPtr bias_in, int64_t channel, int64_t inside) {
#pragma unroll
    for (int l = 0; l < kLane; ++l) {
#pragma unroll
      for (int k = 0; k < 9; ++k) tap[k][l] = l < inside ? load_element(weight, (channel + l) * 9 + k) : 0.0f;
      bias[l] = bias_in && l < inside ? load_element(bias_in, channel + l) : 0.0f;
    }
  }
};

// Copies rows of one tensor's image, one after the other, into shared memory as [columns][kHalves][kChannels], with
// zeros for what lies outside the image or beyond the channels. Aligned: 16 bytes at a time by cp.async, and the zeros
// are written once. Else T is float, and the elements of any dtype go through registers.
template <class T, int kHalves, int kChannels, int kHalo, bool kAligned>
class RowCopy {
 public:
  static constexpr int kColumn = kHalves * kChannels;

  // `start` is the first channel of column 0 of the first row; `channels` exist from there on in each half; columns [x,
  // x + columns) are copied, columns = warps * kRun + kHalo. `ring` has `stages` rows that are `pitch` elements apart.
  __device__ RowCopy(ConstPtr p, int64_t start, int64_t stride_n, int64_t F, int64_t channels, int x, int columns,
                     int64_t W, Shared<T> ring, int stages, int pitch)
      : stride_n_(stride_n), row_(W * stride_n), F_(F), channels_(channels), W_(W), x_(x), columns_(columns) {
    const char* data = static_cast<const char*>(p.data);
    if constexpr (kAligned) {
      const int thread = threadIdx.x, piece = thread % kPieces * kPiece, c = piece % kChannels;
      int column = thread / kPieces;
      start += piece / kChannels * F + c + (x + column) * stride_n;
      for (int turn = 0; turn < kTurns; ++turn, column += static_cast<int>(blockDim.x) / kPieces) {
        if (column >= columns) continue;
        if (x + column >= 0 && x + column < W && c < channels)
          valid_ |= 1u << turn;
        else
          for (int stage = 0; stage < stages; ++stage) zero_piece(ring + stage * pitch, turn);
      }
    }
    next_ = {data + start * size_of(p.dtype), p.dtype};
  }

  // The next row.
  __device__ void operator()(Shared<T> to) {
    const int64_t element = size_of(next_.dtype);
    if constexpr (kAligned) {
      const T* from = static_cast<const T*>(next_.data);
      const int64_t step = static_cast<int64_t>(blockDim.x) / kPieces * stride_n_;
#pragma unroll
      for (int turn = 0; turn < kTurns; ++turn, from += step)
        if (valid_ >> turn & 1) copy_async16(to + (threadIdx.x + turn * blockDim.x) * kPiece, from);
    } else {
      for (int i = threadIdx.x; i < columns_ * kColumn; i += blockDim.x) {
        const int64_t x = x_ + i / kColumn;
        const int half = i / kChannels % kHalves, c = i % kChannels;
        const bool valid = x >= 0 && x < W_ && c < channels_;
        to[i] = valid ? load_element(next_, x * stride_n_ + half * F_ + c) : 0.0f;
      }
    }
    next_.data = static_cast<const char*>(next_.data) + row_ * element;
  }

  // A row outside the image.
  __device__ void zero(Shared<T> to) const {
    if constexpr (kAligned) {
      for (int turn = 0; turn < kTurns; ++turn)
        if (valid_ >> turn & 1) zero_piece(to, turn);
    } else {
      for (int i = threadIdx.x; i < columns_ * kColumn; i += blockDim.x) to[i] = 0.0f;
    }
  }

 private:
  static constexpr int kPiece = 16 / sizeof(T), kPieces = kColumn / kPiece;
  static_assert(kWarpSize % kPieces == 0 || !kAligned, "a thread copies the same channels of every column");
  static constexpr int kTurns = ((kRun + kHalo) * kPieces + kWarpSize - 1) / kWarpSize;  // most with one warp

  __device__ void zero_piece(Shared<T> to, int turn) const {
    copy_async16(to + (threadIdx.x + turn * blockDim.x) * kPiece, static_cast<const T*>(next_.data), false);
  }

  ConstPtr next_;  // where this thread's part of the next row begins
  int64_t stride_n_, row_, F_, channels_, W_;
  int x_, columns_;
  uint32_t valid_ = 0;  // by turn
};

// kLane elements of shared memory from p on.
template <int kLane, class T>
__device__ inline void load_lane(Shared<T> p, float (&v)[kLane]) {
  if constexpr (kLane == 2)
    unpack<T>(load_shared4(p), v[0], v[1]);
  else
    v[0] = to_float(static_cast<T>(p[0]));
}

// kLane elements of a tensor from p on.
template <class T, bool kAligned, int kLane>
__device__ inline void store_lane(Ptr p, const float (&v)[kLane]) {
  if constexpr (!kAligned)
    store_element(p, 0, v[0]);
  else if constexpr (kLane == 2)
    store_global(static_cast<uint32_t*>(p.data), pack<T>(v[0], v[1]));
  else
    store_global(static_cast<T*>(p.data), from_float<T>(v[0]));
}

// Whether 16-byte copies reach every row of a tensor with these strides (in elements).
inline bool takes_copies(ConstPtr p, int64_t stride_b, int64_t stride_n) {
  const int64_t piece = 16 / size_of(p.dtype);
  return reinterpret_cast<uintptr_t>(p.data) % 16 == 0 && stride_b % piece == 0 && stride_n % piece == 0;
}

}  // namespace sana_ext::cuda
