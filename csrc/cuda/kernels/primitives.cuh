// What the kernels are made of; the only home of warp intrinsics and inline PTX. csrc/emulator/primitives.h has a host
// twin of everything in the first part; the second part is built on it and the same for both.
#pragma once
#include "../../common/dtype.h"
#include "../../common/math.h"
#include "runtime.h"

#ifdef SANA_EXT_EMULATOR
#include "../../emulator/primitives.h"
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>

// Starts kernel(arguments) on grid blocks of `block` threads; a cudaError_t.
#define SANA_EXT_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments) \
  ::sana_ext::cuda::launch_kernel(kernel, grid, block, shared_bytes, stream, arguments)

namespace sana_ext::cuda {

constexpr int kWarpSize = 32;
constexpr unsigned kAllLanes = 0xffffffffu;
constexpr size_t kSharedWithoutAsking = 48 << 10;

template <class Args>
cudaError_t launch_kernel(void (*kernel)(Args), dim3 grid, dim3 block, size_t shared_bytes, cudaStream_t stream,
                          const Args& args) {
  if (shared_bytes > kSharedWithoutAsking) {
    const cudaError_t error =
        cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, static_cast<int>(shared_bytes));
    if (error != cudaSuccess) return error;
  }
  void* arguments[] = {const_cast<Args*>(&args)};
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared_bytes, stream);
}

// Types

using BFloat16 = __nv_bfloat16;
using Half = __half;
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

__device__ inline float to_float(BFloat16 v) { return __bfloat162float(v); }
__device__ inline float to_float(Half v) { return __half2float(v); }
__device__ inline float to_float(float v) { return v; }
template <class T>
__device__ inline T from_float(float v);
template <>
__device__ inline BFloat16 from_float<BFloat16>(float v) {
  return __float2bfloat16_rn(v);
}
template <>
__device__ inline Half from_float<Half>(float v) {
  return __float2half_rn(v);
}
template <>
__device__ inline float from_float<float>(float v) {
  return v;
}

// The two elements of a 32-bit word, the lower half first.
template <class T>
__device__ inline void unpack(uint32_t word, float& low, float& high);
template <>
__device__ inline void unpack<BFloat16>(uint32_t word, float& low, float& high) {
  low = __uint_as_float(word << 16), high = __uint_as_float(word & 0xffff0000u);
}
template <>
__device__ inline void unpack<Half>(uint32_t word, float& low, float& high) {
  low = __half2float(__ushort_as_half(static_cast<unsigned short>(word)));
  high = __half2float(__ushort_as_half(static_cast<unsigned short>(word >> 16)));
}
template <class T>
__device__ inline uint32_t pack(float low, float high);
template <>
__device__ inline uint32_t pack<BFloat16>(float low, float high) {
  const __nv_bfloat162 pair = __floats2bfloat162_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}
template <>
__device__ inline uint32_t pack<Half>(float low, float high) {
  const __half2 pair = __floats2half2_rn(low, high);
  uint32_t word;
  memcpy(&word, &pair, sizeof word);
  return word;
}

// max(x, 0) of both elements; a NaN stays one.
template <class T>
__device__ inline uint32_t relu2(uint32_t word);
template <>
__device__ inline uint32_t relu2<BFloat16>(uint32_t word) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(0));
  return result;
}
template <>
__device__ inline uint32_t relu2<Half>(uint32_t word) {
  uint32_t result;
  asm("max.NaN.f16x2 %0, %1, %2;" : "=r"(result) : "r"(word), "r"(0));
  return result;
}

// One instruction of the special function unit each: a relative error of at most 2^-11, and of about 2^-22.
__device__ inline float tanh_approx(float x) {
  float y;
  asm("tanh.approx.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float exp2_approx(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
__device__ inline float reciprocal_approx(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// Global memory. Bytes16 makes one 16-byte access; the address must be a multiple of 16.

// A pointer read from memory: not told so, the compiler would use generic accesses where it leads.
template <class T>
__device__ inline T* to_global(T* p) {
  __builtin_assume(__isGlobal(p));
  return p;
}

template <class T>
__device__ inline T load_global(const T* p) {
  return *p;
}
template <>
__device__ inline Bytes16 load_global(const Bytes16* p) {
  const uint4 v = *reinterpret_cast<const uint4*>(p);
  return {{v.x, v.y, v.z, v.w}};
}
template <class T>
__device__ inline void store_global(T* p, T value) {
  *p = value;
}
// In PTX, since the compiler splits some assignments of a uint4 into four stores.
template <>
__device__ inline void store_global(Bytes16* p, Bytes16 v) {
  asm volatile("st.global.v4.u32 [%0], {%1, %2, %3, %4};" ::"l"(__cvta_generic_to_global(p)), "r"(v.word[0]),
               "r"(v.word[1]), "r"(v.word[2]), "r"(v.word[3])
               : "memory");
}

// Shared memory

template <class T>
using Shared = T*;

// Deals out the block's dynamic shared memory; every thread makes the same calls.
class SharedMemory {
 public:
  __device__ SharedMemory() {
    extern __shared__ uint4 shared_memory[];
    free_ = reinterpret_cast<unsigned char*>(shared_memory);
  }
  template <class T>
  __device__ Shared<T> take(int64_t count) {
    T* array = reinterpret_cast<T*>(free_);
    free_ += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    return array;
  }

 private:
  unsigned char* free_;
};

// Bytes16 at a place in shared memory; the address must be a multiple of 16.
template <class T>
__device__ inline Bytes16 load_shared16(const T* p) {
  return load_global(reinterpret_cast<const Bytes16*>(p));
}
template <class T>
__device__ inline void store_shared16(T* p, const Bytes16& v) {
  *reinterpret_cast<uint4*>(p) = make_uint4(v.word[0], v.word[1], v.word[2], v.word[3]);
}

// Four aligned bytes of shared memory.
template <class T>
__device__ inline uint32_t load_shared4(const T* p) {
  return *reinterpret_cast<const uint32_t*>(p);
}

template <class T>
__device__ inline uint32_t shared_address(const T* p) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(p));
}

// Copies 16 bytes without passing through registers. They may be read by this thread after copy_async_wait, by others
// after a barrier that follows it. `valid == false` writes zeros and does not touch the source.
template <class T>
__device__ inline void copy_async16(T* to, const T* from, bool valid = true) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from), "r"(valid ? 16 : 0)
               : "memory");
}
// Closes a group of copies; copy_async_wait<n> waits for all but the n youngest groups of this thread.
__device__ inline void copy_async_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }
template <int kGroupsInFlight>
__device__ inline void copy_async_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroupsInFlight) : "memory");
}

// Barrier 1 to 15 for `threads` threads of the block, whole warps of them.
__device__ inline void named_barrier(int id, unsigned threads) {
  asm volatile("bar.sync %0, %1;" ::"r"(id), "r"(threads) : "memory");
}

// kMatrices 8x8 matrices of 16-bit elements. Lane 8m + r names row r of matrix m (16 aligned bytes). Lane i gets
// elements (i / 4, 2 (i % 4)) and the next of each row, or, transposed, (2 (i % 4), i / 4) and the one below.
template <class T>
__device__ inline void load_matrix(uint32_t (&r)[1], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
__device__ inline void load_matrix(uint32_t (&r)[2], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
__device__ inline void load_matrix(uint32_t (&r)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
__device__ inline void load_matrix_transposed(uint32_t (&r)[1], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x1.trans.shared.b16 {%0}, [%1];"
               : "=r"(r[0])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
__device__ inline void load_matrix_transposed(uint32_t (&r)[2], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.trans.shared.b16 {%0, %1}, [%2];"
               : "=r"(r[0]), "=r"(r[1])
               : "r"(shared_address(row))
               : "memory");
}
template <class T>
__device__ inline void load_matrix_transposed(uint32_t (&r)[4], const T* row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(r[0]), "=r"(r[1]), "=r"(r[2]), "=r"(r[3])
               : "r"(shared_address(row))
               : "memory");
}

// d[16, 8] += a[16, 16] b[16, 8] in fp32. With g = lane / 4 and t = 2 (lane % 4), pairs along the row of a, down the
// column of b and along the row of d: a = (g, t), (g + 8, t), (g, t + 8), (g + 8, t + 8); b = (t, g), (t + 8, g);
// d = (g, t), (g + 8, t).
template <class T>
__device__ inline void mma_16x8x16(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]);
template <>
__device__ inline void mma_16x8x16<BFloat16>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}
template <>
__device__ inline void mma_16x8x16<Half>(float (&d)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

}  // namespace sana_ext::cuda
#endif  // SANA_EXT_EMULATOR

namespace sana_ext::cuda {

// Sum over the 32 lanes of a warp, in every lane; the order is fixed.
__device__ inline float warp_sum(float value) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  return value;
}

// Sum over a block of kWarps warps, in every thread. `slots` is kWarps floats of shared memory, reusable after the next
// barrier.
template <int kWarps>
__device__ inline float block_sum(float value, Shared<float> slots) {
  value = warp_sum(value);
  if (threadIdx.x % kWarpSize == 0) slots[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  float total = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += slots[warp];
  return total;
}

// Bytes that SharedMemory::take<T>(count) uses.
template <class T>
constexpr size_t shared_size(int64_t count) {
  return (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
}

// Element i of a tensor as float. The dtype is uniform over the grid, so the branch does not diverge.
__device__ inline float load_element(ConstPtr p, int64_t i) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return to_float(load_global(static_cast<const BFloat16*>(p.data) + i));
    case Dtype::kFloat16:
      return to_float(load_global(static_cast<const Half*>(p.data) + i));
    default:
      return load_global(static_cast<const float*>(p.data) + i);
  }
}

__device__ inline void store_element(Ptr p, int64_t i, float value) {
  switch (p.dtype) {
    case Dtype::kBFloat16:
      return store_global(static_cast<BFloat16*>(p.data) + i, from_float<BFloat16>(value));
    case Dtype::kFloat16:
      return store_global(static_cast<Half*>(p.data) + i, from_float<Half>(value));
    default:
      return store_global(static_cast<float*>(p.data) + i, value);
  }
}

}  // namespace sana_ext::cuda
