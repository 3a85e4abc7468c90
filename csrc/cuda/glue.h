// From torch tensors (stable ABI) to the pointers that the CUDA kernels take. Included by every csrc/cuda/<op>.cpp,
// which is compiled twice: for the GPU, and against the emulator, whose ops take the place of the CPU's in tests.
#pragma once
#include "../glue/tensors.h"
#include "kernels/runtime.h"

#ifdef SANA_EXT_EMULATOR
#include <deque>

#include "../emulator/memory.h"
#define SANA_EXT_DEVICE CPU
#else
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#define SANA_EXT_DEVICE CUDA
#endif

namespace sana_ext::cuda {

using glue::check_shape;
using glue::dense_rows;
using glue::empty;
using glue::OptionalTensor;
using glue::stride;
using glue::Tensor;
using torch::headeronly::ScalarType;

// One op's launches: the device and stream of its first tensor while it lives, and every tensor's way to a pointer.
class Launch {
 public:
#ifdef SANA_EXT_EMULATOR
  explicit Launch(const Tensor&) {}
#else
  explicit Launch(const Tensor& like) : index_(like.get_device_index()), guard_(index_) {}
#endif

  ConstPtr in(const Tensor& t, const char* name) {
    know(t, t.const_data_ptr(), name, false);
    return glue::in(t, name);
  }
  ConstPtr in(const OptionalTensor& t, const char* name) { return t ? in(*t, name) : ConstPtr{}; }
  Ptr out(Tensor& t, const char* name) {
    know(t, t.const_data_ptr(), name, true);
    return glue::out(t);
  }
  // Statistics and partial sums are fp32 on CUDA.
  const float* in_fp32(const Tensor& t, const char* name) {
    check(t.scalar_type() == ScalarType::Float, name, " must be float32");
    return static_cast<const float*>(in(t, name).data);
  }
  float* out_fp32(Tensor& t, const char* name) { return static_cast<float*>(out(t, name).data); }

  // Tensors of any dtype; the kernel knows which.
  const void* in_raw(const Tensor& t, const char* name) {
    place(t, t.const_data_ptr(), name, false);
    return t.const_data_ptr();
  }
  void* out_raw(const Tensor& t, const char* name) {
    place(t, t.const_data_ptr(), name, true);
    return t.mutable_data_ptr();
  }

#ifdef SANA_EXT_EMULATOR
  cudaStream_t stream() const { return nullptr; }
#else
  cudaStream_t stream() const {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(index_, &stream));
    return static_cast<cudaStream_t>(stream);
  }
#endif

  static void succeeded(cudaError_t error, const char* name) {
    check(error == cudaSuccess, name, ": ", cudaGetErrorString(error));
  }

 private:
  void know(const Tensor& t, const void* data, const char* name, bool writable) {
    check(!glue::is_fp64(t), name, ": float64 is not supported on CUDA");
    place(t, data, name, writable);
  }
#ifdef SANA_EXT_EMULATOR
  void place(const Tensor& t, const void* data, const char* name, bool writable) {
    int64_t elements = t.numel() > 0;
    for (int64_t i = 0; i < t.dim() && elements > 0; ++i) elements += (t.size(i) - 1) * t.stride(i);
    memory_.emplace_back(name, data, static_cast<size_t>(elements * t.element_size()), writable);
  }
  std::deque<emulator::GlobalMemory> memory_;
#else
  void place(const Tensor& t, const void*, const char* name, bool) {
    check(t.get_device_index() == index_, name, ": all tensors must be on one device");
  }
  int32_t index_;
  torch::stable::accelerator::DeviceGuard guard_;
#endif
};

}  // namespace sana_ext::cuda
