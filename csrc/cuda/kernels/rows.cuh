// Eight neighbouring elements of a row at once, in fp32, whatever the tensor's dtype: 16-byte accesses, one for 16-bit
// types and two for fp32. The dtype is uniform over the grid, so the branches do not diverge.
#pragma once
#include "primitives.cuh"

namespace sana_ext::cuda {

constexpr int kGroup = 8;

template <class T>
__device__ inline void unpack8(const Bytes16& w, float (&v)[kGroup]) {
#pragma unroll
  for (int i = 0; i < 4; ++i) unpack<T>(w.word[i], v[2 * i], v[2 * i + 1]);
}
template <class T>
__device__ inline Bytes16 pack8(const float (&v)[kGroup]) {
  Bytes16 w;
#pragma unroll
  for (int i = 0; i < 4; ++i) w.word[i] = pack<T>(v[2 * i], v[2 * i + 1]);
  return w;
}

// Elements [i, i + 8) of p; their address is a multiple of 16.
__device__ inline void load8(ConstPtr p, int64_t i, float (&v)[kGroup]) {
  const char* from = static_cast<const char*>(p.data);
  if (p.dtype == Dtype::kFloat32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const Bytes16 w = load_global(reinterpret_cast<const Bytes16*>(from + i * 4) + half);
#pragma unroll
      for (int k = 0; k < 4; ++k) v[4 * half + k] = bits_float(w.word[k]);
    }
    return;
  }
  const Bytes16 w = load_global(reinterpret_cast<const Bytes16*>(from + i * 2));
  if (p.dtype == Dtype::kBFloat16)
    unpack8<BFloat16>(w, v);
  else
    unpack8<Half>(w, v);
}

__device__ inline void store8(Ptr p, int64_t i, const float (&v)[kGroup]) {
  char* to = static_cast<char*>(p.data);
  if (p.dtype == Dtype::kFloat32) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      Bytes16 w;
#pragma unroll
      for (int k = 0; k < 4; ++k) w.word[k] = float_bits(v[4 * half + k]);
      store_global(reinterpret_cast<Bytes16*>(to + i * 4) + half, w);
    }
    return;
  }
  store_global(reinterpret_cast<Bytes16*>(to + i * 2),
               p.dtype == Dtype::kBFloat16 ? pack8<BFloat16>(v) : pack8<Half>(v));
}

// The values as a tensor of this dtype would hold them.
__device__ inline void round8(Dtype dtype, float (&v)[kGroup]) {
  if (dtype == Dtype::kBFloat16) unpack8<BFloat16>(pack8<BFloat16>(v), v);
  if (dtype == Dtype::kFloat16) unpack8<Half>(pack8<Half>(v), v);
}
__device__ inline float round_to(Dtype dtype, float v) {
  if (dtype == Dtype::kBFloat16) return to_float(from_float<BFloat16>(v));
  if (dtype == Dtype::kFloat16) return to_float(from_float<Half>(v));
  return v;
}

// Whether load8 and store8 reach every row of a tensor with these strides (in elements).
inline bool takes_groups(ConstPtr p, int64_t stride_b, int64_t stride_n) {
  return !p || (reinterpret_cast<uintptr_t>(p.data) % 16 == 0 && stride_b % kGroup == 0 && stride_n % kGroup == 0);
}

}  // namespace sana_ext::cuda
