// Host twins of what kernels are written in: the CUDA language's names and the primitives of
// cuda/kernels/primitives.cuh.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "../common/math.h"
#include "block.h"
#include "memory.h"

#define __global__
#define __device__
#define __forceinline__
#define __launch_bounds__(...)

#define SANA_EXT_SITE ::sana_ext::emulator::Site site = {__builtin_FILE(), __builtin_LINE()}

// Runs kernel(arguments) on grid blocks of `block` threads. Each thread gets its own copy of the arguments.
#define SANA_EXT_LAUNCH(kernel, grid, block, shared_bytes, stream, arguments) \
  ::sana_ext::emulator::launch(#kernel, grid, block, shared_bytes, stream,    \
                               [arguments = arguments] { kernel(arguments); })

namespace sana_ext::cuda {

inline emulator::Block& this_block() { return *emulator::Block::active(); }

#define threadIdx (::sana_ext::cuda::this_block().thread().index)
#define blockIdx (::sana_ext::cuda::this_block().index())
#define blockDim (::sana_ext::cuda::this_block().size())
#define gridDim (::sana_ext::cuda::this_block().grid())

// Types

struct BFloat16 {
  uint16_t bits;
};
struct Half {
  uint16_t bits;
};
struct alignas(16) Bytes16 {
  uint32_t word[4];
};

inline float to_float(BFloat16 v) { return bfloat16_to_float(v.bits); }
inline float to_float(Half v) { return half_to_float(v.bits); }
inline float to_float(float v) { return v; }
template <class T>
T from_float(float v) {
  if constexpr (std::is_same_v<T, BFloat16>)
    return {float_to_bfloat16(v)};
  else if constexpr (std::is_same_v<T, Half>)
    return {float_to_half(v)};
  else
    return v;
}
// The two elements of a 32-bit word, the lower half first.
template <class T>
void unpack(uint32_t word, float& low, float& high) {
  low = to_float(T{static_cast<uint16_t>(word)}), high = to_float(T{static_cast<uint16_t>(word >> 16)});
}
template <class T>
uint32_t pack(float low, float high) {
  return from_float<T>(low).bits | static_cast<uint32_t>(from_float<T>(high).bits) << 16;
}
// max(x, 0) of both elements; a NaN stays one.
template <class T>
uint32_t relu2(uint32_t word) {
  const auto relu = [](uint16_t bits) {
    const float v = to_float(T{bits});
    return v > 0.0f || v != v ? bits : uint16_t{0};
  };
  return relu(static_cast<uint16_t>(word)) | static_cast<uint32_t>(relu(static_cast<uint16_t>(word >> 16))) << 16;
}

inline float rsqrtf(float v) { return 1.0f / std::sqrt(v); }

// As far off as the instruction may be: rounded to 11 bits.
inline float tanh_approx(float x) {
  const uint32_t bits = float_bits(std::tanh(x));
  return bits_float((bits + 0xfffu + (bits >> 13 & 1u)) & ~0x1fffu);
}
inline float exp2_approx(float x) { return std::exp2(x); }
inline float reciprocal_approx(float x) { return 1.0f / x; }

// Global memory

inline void check_global(const void* p, size_t bytes, bool write) {
  const dim3 index = blockIdx, size = gridDim;
  const uint32_t block = (index.z * size.y + index.y) * size.x + index.x;
  if (const std::string wrong = emulator::check_global(p, bytes, write, block); !wrong.empty())
    this_block().fault(wrong);
}
template <class T>
T* to_global(T* p) {
  return p;
}
template <class T>
T load_global(const T* p) {
  check_global(p, sizeof(T), false);
  return *p;
}
template <class T>
void store_global(T* p, std::common_type_t<T> value) {
  check_global(p, sizeof(T), true);
  *p = value;
}

// Shared memory

template <class T>
class Shared;

// An element of shared memory: converts to T when read.
template <class T>
class SharedElement {
 public:
  SharedElement(const Shared<T>& array, int64_t i) : offset_(array.checked(i, 1)) {}
  operator T() const {
    T value;
    this_block().read_shared(offset_, &value, sizeof(T));
    return value;
  }
  const SharedElement& operator=(T value) const {
    this_block().write_shared(offset_, &value, sizeof(T));
    return *this;
  }
  const SharedElement& operator=(const SharedElement& other) const { return *this = static_cast<T>(other); }
  SharedElement(const SharedElement&) = default;
  const SharedElement& operator+=(T value) const { return *this = static_cast<T>(*this) + value; }

 private:
  size_t offset_;
};

// An array in shared memory, and like a pointer a place in it.
template <class T>
class Shared {
 public:
  Shared() = default;
  Shared(size_t begin, int64_t count) : begin_(begin), count_(count) {}
  SharedElement<T> operator[](int64_t i) const { return {*this, i}; }
  Shared operator+(int64_t i) const {
    Shared other = *this;
    other.at_ += i;
    return other;
  }
  // Offset in the block's shared memory of elements [i, i + n), which the array must have.
  size_t checked(int64_t i, int64_t n) const {
    i += at_;
    if (i < 0 || i + n > count_)
      this_block().fault("out of bounds: element " + std::to_string(i < 0 ? i : i + n - 1) + " of a shared array of " +
                         std::to_string(count_));
    return begin_ + static_cast<size_t>(i) * sizeof(T);
  }
  // The same for `bytes` aligned bytes.
  size_t checked_bytes(size_t bytes) const {
    const size_t offset = checked(0, static_cast<int64_t>(bytes / sizeof(T)));
    if (offset % bytes != 0)
      this_block().fault("shared memory at byte " + std::to_string(offset) + " is no multiple of " +
                         std::to_string(bytes));
    return offset;
  }
  size_t checked16() const { return checked_bytes(16); }

 private:
  size_t begin_ = 0;
  int64_t count_ = 0, at_ = 0;
};

// Deals out the block's dynamic shared memory; every thread makes the same calls.
class SharedMemory {
 public:
  template <class T>
  Shared<T> take(int64_t count) {
    const size_t begin = used_;
    used_ += (static_cast<size_t>(count) * sizeof(T) + 15) / 16 * 16;
    if (used_ > this_block().shared_bytes())
      this_block().fault("takes " + std::to_string(used_) + " bytes of shared memory, launched with " +
                         std::to_string(this_block().shared_bytes()));
    return {begin, count};
  }

 private:
  size_t used_ = 0;
};

template <class T>
Bytes16 load_shared16(Shared<T> p) {
  Bytes16 value;
  this_block().read_shared(p.checked16(), &value, 16);
  return value;
}
template <class T>
uint32_t load_shared4(Shared<T> p) {
  uint32_t value;
  this_block().read_shared(p.checked_bytes(4), &value, 4);
  return value;
}
template <class T>
void store_shared16(Shared<T> p, const Bytes16& value) {
  this_block().write_shared(p.checked16(), &value, 16);
}

// The bytes arrive at the wait; `valid == false` copies zeros and does not touch the source.
template <class T>
void copy_async16(Shared<T> to, const T* from, bool valid = true) {
  if (valid) check_global(from, 16, false);
  this_block().copy_async(to.checked16(), valid ? from : nullptr, 16);
}
inline void copy_async_commit() { this_block().commit_copies(); }
template <int kGroupsInFlight>
void copy_async_wait() {
  this_block().wait_copies(kGroupsInFlight);
}

// Synchronisation

inline void __syncthreads(SANA_EXT_SITE) {
  const dim3 size = blockDim;
  this_block().barrier(0, size.x * size.y * size.z, site);
}
inline void named_barrier(int id, unsigned threads, SANA_EXT_SITE) { this_block().barrier(id, threads, site); }
inline void __syncwarp(unsigned mask = 0xffffffffu, SANA_EXT_SITE) {
  this_block().collective("__syncwarp", mask, nullptr, nullptr, nullptr, site, true);
}

}  // namespace sana_ext::cuda

#include "warp.h"
