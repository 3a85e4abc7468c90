// CUDA glue of the norm_modulate family.
#include "kernels/norm_modulate.h"

#include "glue.h"

namespace sana_ext::cuda {
namespace {

// Absent outputs are tensors of no elements: a schema with fixed outputs is what torch.compile likes best.
Tensor none(const Tensor& like) { return empty(like, {0}, ScalarType::Float); }

struct Forward {
  Tensor z, n, mean, rstd;
};

Forward run_forward(const Tensor& x_in, const OptionalTensor& y_in, const OptionalTensor& gate_in,
                    const OptionalTensor& shift_in, const OptionalTensor& scale_in, double eps, ScalarType n_dtype) {
  check(x_in.dim() == 3, "x must have shape [B, N, C]");
  const int64_t B = x_in.size(0), N = x_in.size(1), C = x_in.size(2);
  check_shape(y_in, "y", {B, N, C});
  check_shape(gate_in, "gate", {B, C});
  check_shape(shift_in, "shift", {B, C});
  check_shape(scale_in, "scale", {B, C});
  Launch launch(x_in);
  const Tensor x = dense_rows(x_in);
  const OptionalTensor y = dense_rows(y_in), gate = dense_rows(gate_in), shift = dense_rows(shift_in),
                       scale = dense_rows(scale_in);
  Forward result{none(x), none(x), none(x), none(x)};
  NormModulateForward a{};
  a.B = B, a.N = N, a.C = C, a.eps = static_cast<float>(eps);
  a.x = launch.in(x, "x"), a.x_stride_b = x.stride(0), a.x_stride_n = x.stride(1);
  a.y = launch.in(y, "y"), a.y_stride_b = stride(y, 0), a.y_stride_n = stride(y, 1);
  a.gate = launch.in(gate, "gate"), a.gate_stride_b = stride(gate, 0);
  a.shift = launch.in(shift, "shift"), a.shift_stride_b = stride(shift, 0);
  a.scale = launch.in(scale, "scale"), a.scale_stride_b = stride(scale, 0);
  if (y) {
    result.z = empty(x, {B, N, C}, x.scalar_type());
    a.z = launch.out(result.z, "z");
  }
  if (scale) {
    result.n = empty(x, {B, N, C}, n_dtype);
    result.mean = empty(x, {B, N}, ScalarType::Float);
    result.rstd = empty(x, {B, N}, ScalarType::Float);
    a.n = launch.out(result.n, "n");
    a.mean = launch.out_fp32(result.mean, "mean"), a.rstd = launch.out_fp32(result.rstd, "rstd");
  }
  Launch::succeeded(norm_modulate_forward(a, launch.stream()), "norm_modulate_forward");
  return result;
}

struct Backward {
  Tensor dx, dy, dgate, dshift, dscale;
};

Backward run_backward(const OptionalTensor& dz_in, const OptionalTensor& dn_in, const OptionalTensor& z_in,
                      const OptionalTensor& y_in, const OptionalTensor& gate_in, const OptionalTensor& scale_in,
                      const OptionalTensor& mean_in, const OptionalTensor& rstd_in, ScalarType x_dtype,
                      ScalarType shift_dtype) {
  const Tensor& first = dz_in ? *dz_in : *dn_in;
  check(first.dim() == 3, "the gradient must have shape [B, N, C]");
  const int64_t B = first.size(0), N = first.size(1), C = first.size(2);
  for (const auto* t : {&dz_in, &dn_in, &z_in, &y_in}) check_shape(*t, "every row argument", {B, N, C});
  for (const auto* t : {&gate_in, &scale_in}) check_shape(*t, "gate and scale", {B, C});
  for (const auto* t : {&mean_in, &rstd_in}) check_shape(*t, "mean and rstd", {B, N});
  Launch launch(first);
  const OptionalTensor dz = dense_rows(dz_in), dn = dense_rows(dn_in), z = dense_rows(z_in), y = dense_rows(y_in),
                       gate = dense_rows(gate_in), scale = dense_rows(scale_in);
  Backward result{none(first), none(first), none(first), none(first), none(first)};
  NormModulateBackward a{};
  a.B = B, a.N = N, a.C = C, a.rows_per_block = norm_modulate_rows_per_block(B, N);
  a.dz = launch.in(dz, "dz"), a.dz_stride_b = stride(dz, 0), a.dz_stride_n = stride(dz, 1);
  a.dn = launch.in(dn, "dn"), a.dn_stride_b = stride(dn, 0), a.dn_stride_n = stride(dn, 1);
  a.z = launch.in(z, "z"), a.z_stride_b = stride(z, 0), a.z_stride_n = stride(z, 1);
  a.y = launch.in(y, "y"), a.y_stride_b = stride(y, 0), a.y_stride_n = stride(y, 1);
  a.gate = launch.in(gate, "gate"), a.gate_stride_b = stride(gate, 0);
  a.scale = launch.in(scale, "scale"), a.scale_stride_b = stride(scale, 0);
  const int64_t blocks = (N + a.rows_per_block - 1) / a.rows_per_block;
  Tensor partial = empty(first, {B, blocks, 3, C}, ScalarType::Float);
  a.partial = launch.out_fp32(partial, "partial");
  PartialSums s{};
  s.B = B, s.blocks = blocks, s.C = C, s.partial = a.partial;
  OptionalTensor mean, rstd;
  if (dn) {
    mean = torch::stable::contiguous(*mean_in), rstd = torch::stable::contiguous(*rstd_in);
    a.mean = launch.in_fp32(*mean, "mean"), a.rstd = launch.in_fp32(*rstd, "rstd");
    result.dx = empty(first, {B, N, C}, x_dtype);
    result.dshift = empty(first, {B, C}, shift_dtype);
    result.dscale = empty(first, {B, C}, scale->scalar_type());
    a.dx = launch.out(result.dx, "dx");
    s.out[0] = launch.out(result.dshift, "dshift"), s.out[1] = launch.out(result.dscale, "dscale");
  }
  if (y) {
    result.dy = empty(first, {B, N, C}, y->scalar_type());
    a.dy = launch.out(result.dy, "dy");
  }
  if (gate) {
    result.dgate = empty(first, {B, C}, gate->scalar_type());
    s.out[2] = launch.out(result.dgate, "dgate");
  }
  Launch::succeeded(norm_modulate_backward(a, launch.stream()), "norm_modulate_backward");
  if (dn || gate) Launch::succeeded(sum_partials(s, launch.stream()), "sum_partials");
  return result;
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate_forward_cuda(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                              double eps, ScalarType out_dtype) {
  auto r = run_forward(x, std::nullopt, std::nullopt, shift, scale, eps, out_dtype);
  return {r.n, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate_backward_cuda(const Tensor& dn, const Tensor& x, const Tensor& scale,
                                                               const Tensor& mean, const Tensor& rstd,
                                                               ScalarType shift_dtype) {
  auto r =
      run_backward(std::nullopt, dn, x, std::nullopt, std::nullopt, scale, mean, rstd, x.scalar_type(), shift_dtype);
  return {r.dx, r.dshift, r.dscale};
}

Tensor gated_residual_forward_cuda(const Tensor& x, const Tensor& y, const Tensor& gate) {
  return run_forward(x, y, gate, std::nullopt, std::nullopt, 0.0, x.scalar_type()).z;
}

std::tuple<Tensor, Tensor> gated_residual_backward_cuda(const Tensor& dout, const Tensor& y, const Tensor& gate) {
  auto r = run_backward(dout, std::nullopt, std::nullopt, y, gate, std::nullopt, std::nullopt, std::nullopt,
                        dout.scalar_type(), dout.scalar_type());
  return {r.dy, r.dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_modulate_forward_cuda(const Tensor& x, const Tensor& y,
                                                                               const OptionalTensor& gate,
                                                                               const Tensor& shift, const Tensor& scale,
                                                                               double eps, ScalarType out_dtype) {
  auto r = run_forward(x, y, gate, shift, scale, eps, out_dtype);
  return {r.z, r.n, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm_modulate_backward_cuda(
    const Tensor& dz, const Tensor& dn, const Tensor& z, const Tensor& y, const OptionalTensor& gate,
    const Tensor& scale, const Tensor& mean, const Tensor& rstd, ScalarType shift_dtype) {
  auto r = run_backward(dz, dn, z, y, gate, scale, mean, rstd, z.scalar_type(), shift_dtype);
  return {r.dx, r.dy, r.dgate, r.dshift, r.dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, SANA_EXT_DEVICE, m) {
  m.impl("norm_modulate_forward", TORCH_BOX(&norm_modulate_forward_cuda));
  m.impl("norm_modulate_backward", TORCH_BOX(&norm_modulate_backward_cuda));
  m.impl("gated_residual_forward", TORCH_BOX(&gated_residual_forward_cuda));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward_cuda));
  m.impl("residual_norm_modulate_forward", TORCH_BOX(&residual_norm_modulate_forward_cuda));
  m.impl("residual_norm_modulate_backward", TORCH_BOX(&residual_norm_modulate_backward_cuda));
}

}  // namespace sana_ext::cuda
