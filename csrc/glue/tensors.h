// From torch tensors (stable ABI) to the pointers that the kernels take. For every device.
#pragma once
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <cstdint>
#include <initializer_list>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../common/check.h"
#include "../common/dtype.h"

namespace sana_ext::glue {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using OptionalTensor = std::optional<Tensor>;

inline Dtype dtype_of(const Tensor& t, const char* name) {
  switch (t.scalar_type()) {
    case ScalarType::Double:
      return Dtype::kFloat64;
    case ScalarType::Float:
      return Dtype::kFloat32;
    case ScalarType::BFloat16:
      return Dtype::kBFloat16;
    case ScalarType::Half:
      return Dtype::kFloat16;
    default:
      fail(name, " must be float64, float32, bfloat16 or float16");
  }
}

inline ConstPtr in(const Tensor& t, const char* name) { return {t.const_data_ptr(), dtype_of(t, name)}; }
inline ConstPtr in(const OptionalTensor& t, const char* name) { return t ? in(*t, name) : ConstPtr{}; }
inline Ptr out(Tensor& t) { return {t.mutable_data_ptr(), dtype_of(t, "output")}; }

// float64 inputs accumulate in float64, everything else in float32.
inline bool is_fp64(const Tensor& t) { return t.scalar_type() == ScalarType::Double; }
inline ScalarType accumulator_of(const Tensor& t) { return is_fp64(t) ? ScalarType::Double : ScalarType::Float; }

inline void check_shape(const Tensor& t, const char* name, std::initializer_list<int64_t> shape) {
  bool same = t.dim() == static_cast<int64_t>(shape.size());
  int64_t i = 0;
  for (const int64_t size : shape) same = same && t.size(i++) == size;
  if (same) return;
  std::ostringstream message;
  message << name << " must have shape [";
  for (const int64_t size : shape) message << size << ' ';
  message << "]";
  fail(message.str());
}
inline void check_shape(const OptionalTensor& t, const char* name, std::initializer_list<int64_t> shape) {
  if (t) check_shape(*t, name, shape);
}

inline void check_same_precision(const Tensor& x, const Tensor& t, const char* name) {
  check(is_fp64(x) == is_fp64(t), name, " must be float64 if and only if the first argument is");
}
inline void check_same_precision(const Tensor& x, const OptionalTensor& t, const char* name) {
  if (t) check_same_precision(x, *t, name);
}

// Runs a call of torch that allocates; through the stable ABI such a call does not say why it failed.
template <class Allocate>
Tensor allocated(const Allocate& allocate, int64_t elements) {
  try {
    return allocate();
  } catch (const std::exception&) {
    throw std::runtime_error("sana_ext: out of memory: cannot allocate " + std::to_string(elements) + " elements");
  }
}

inline Tensor dense(const Tensor& t) {
  return allocated([&] { return torch::stable::contiguous(t); }, t.numel());
}
inline OptionalTensor dense(const OptionalTensor& t) { return t ? OptionalTensor(dense(*t)) : std::nullopt; }

// The kernels take any strides except on the last dimension, which must be dense (or of size 1); else a copy is made.
inline Tensor dense_rows(const Tensor& t) {
  const int64_t last = t.dim() - 1;
  return t.size(last) <= 1 || t.stride(last) == 1 ? t : dense(t);
}
inline OptionalTensor dense_rows(const OptionalTensor& t) { return t ? OptionalTensor(dense_rows(*t)) : std::nullopt; }

inline int64_t stride(const OptionalTensor& t, int64_t dim) { return t ? t->stride(dim) : 0; }

// Asks for huge pages behind a large fresh tensor: the first touch of 4 KiB pages costs more than most kernels here. A
// hint only; without it, or where the kernel refuses, nothing changes.
inline void prefer_huge_pages(void* data, int64_t bytes) {
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  constexpr uintptr_t kPage = 4096, kHugePage = 2 << 20;
  if (bytes < static_cast<int64_t>(2 * kHugePage)) return;
  const uintptr_t begin = (reinterpret_cast<uintptr_t>(data) + kPage - 1) / kPage * kPage;
  const uintptr_t end = (reinterpret_cast<uintptr_t>(data) + static_cast<uintptr_t>(bytes)) / kPage * kPage;
  madvise(reinterpret_cast<void*>(begin), end - begin, MADV_HUGEPAGE);
#else
  (void)data, (void)bytes;
#endif
}

inline Tensor empty(const Tensor& like, std::initializer_list<int64_t> shape, ScalarType dtype) {
  int64_t elements = 1;
  for (const int64_t size : shape) elements *= size;
  Tensor t = allocated([&] { return torch::stable::new_empty(like, shape, dtype); }, elements);
  if (t.is_cpu()) prefer_huge_pages(t.mutable_data_ptr(), t.numel() * t.element_size());
  return t;
}

}  // namespace sana_ext::glue
