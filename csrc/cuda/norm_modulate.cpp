// CUDA glue of norm_modulate. The backward and the residual forms have no CUDA kernel yet: the default kernel answers.
#include "kernels/norm_modulate.h"

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>

#include "../cpu/glue.h"

namespace sana_ext::cuda {
namespace {

using cpu::Tensor;
using torch::headeronly::ScalarType;

cudaStream_t current_stream(const Tensor& t) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(t.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate_forward_cuda(const Tensor& x_in, const Tensor& shift_in,
                                                              const Tensor& scale_in, double eps,
                                                              ScalarType out_dtype) {
  check(x_in.dim() == 3, "x must have shape [B, N, C]");
  const int64_t B = x_in.size(0), N = x_in.size(1), C = x_in.size(2);
  cpu::check_shape(shift_in, "shift", {B, C});
  cpu::check_shape(scale_in, "scale", {B, C});
  for (const Tensor* t : {&x_in, &shift_in, &scale_in}) {
    check(!cpu::is_fp64(*t), "float64 is not supported on CUDA");
    check(t->get_device_index() == x_in.get_device_index(), "all tensors must be on one device");
  }
  const torch::stable::accelerator::DeviceGuard guard(x_in.get_device_index());
  const Tensor x = cpu::dense_rows(x_in), shift = cpu::dense_rows(shift_in), scale = cpu::dense_rows(scale_in);
  Tensor n = cpu::empty(x, {B, N, C}, out_dtype);
  Tensor mean = cpu::empty(x, {B, N}, ScalarType::Float), rstd = cpu::empty(x, {B, N}, ScalarType::Float);
  NormModulateForward a{};
  a.B = B, a.N = N, a.C = C, a.eps = static_cast<float>(eps);
  a.x = cpu::in(x, "x"), a.x_stride_b = x.stride(0), a.x_stride_n = x.stride(1);
  a.shift = cpu::in(shift, "shift"), a.shift_stride_b = shift.stride(0);
  a.scale = cpu::in(scale, "scale"), a.scale_stride_b = scale.stride(0);
  a.n = cpu::out(n);
  a.mean = static_cast<float*>(mean.mutable_data_ptr()), a.rstd = static_cast<float*>(rstd.mutable_data_ptr());
  const cudaError_t error = norm_modulate_forward(a, current_stream(x));
  check(error == cudaSuccess, "norm_modulate_forward: ", cudaGetErrorString(error));
  return {n, mean, rstd};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CUDA, m) {
  m.impl("norm_modulate_forward", TORCH_BOX(&norm_modulate_forward_cuda));
}

}  // namespace sana_ext::cuda
