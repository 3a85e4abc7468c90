// Element types that kernels accept, and a pointer that carries its type. Torch-free.
#pragma once
#include <cstdint>

#ifdef __CUDACC__
#define SANA_EXT_ON_BOTH __host__ __device__
#else
#define SANA_EXT_ON_BOTH
#endif

namespace sana_ext {

enum class Dtype : int { kFloat64, kFloat32, kBFloat16, kFloat16 };

SANA_EXT_ON_BOTH constexpr int64_t size_of(Dtype dtype) {
  return dtype == Dtype::kFloat64 ? 8 : dtype == Dtype::kFloat32 ? 4 : 2;
}

// The start of a tensor's elements. `data == nullptr` means "this optional tensor is absent".
struct ConstPtr {
  const void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  SANA_EXT_ON_BOTH explicit operator bool() const { return data != nullptr; }
};

struct Ptr {
  void* data = nullptr;
  Dtype dtype = Dtype::kFloat32;
  SANA_EXT_ON_BOTH explicit operator bool() const { return data != nullptr; }
  SANA_EXT_ON_BOTH operator ConstPtr() const { return {data, dtype}; }
};

}  // namespace sana_ext
