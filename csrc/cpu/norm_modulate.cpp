#include "kernels/norm_modulate.h"

#include "glue.h"

namespace sana_ext::cpu {
namespace {

// Absent outputs are tensors of no elements: a schema with fixed outputs is what torch.compile likes best.
Tensor none(const Tensor& like) { return empty(like, {0}, accumulator_of(like)); }

struct Forward {
  Tensor z, n, mean, rstd;
};

Forward run_forward(const Tensor& x_in, const OptionalTensor& y_in, const OptionalTensor& gate_in,
                    const OptionalTensor& shift_in, const OptionalTensor& scale_in, double eps,
                    std::optional<ScalarType> n_dtype) {
  check(x_in.dim() == 3, "x must have shape [B, N, C]");
  const int64_t B = x_in.size(0), N = x_in.size(1), C = x_in.size(2);
  check_shape(y_in, "y", {B, N, C});
  check_shape(gate_in, "gate", {B, C});
  check_shape(shift_in, "shift", {B, C});
  check_shape(scale_in, "scale", {B, C});
  for (const auto* t : {&y_in, &gate_in, &shift_in, &scale_in}) check_same_precision(x_in, *t, "every argument");
  const Tensor x = dense_rows(x_in);
  const OptionalTensor y = dense_rows(y_in), gate = dense_rows(gate_in), shift = dense_rows(shift_in),
                       scale = dense_rows(scale_in);

  Forward result{none(x), none(x), none(x), none(x)};
  if (y) result.z = empty(x, {B, N, C}, x.scalar_type());
  if (scale) {
    result.n = empty(x, {B, N, C}, n_dtype.value_or(y ? y->scalar_type() : x.scalar_type()));
    result.mean = empty(x, {B, N}, accumulator_of(x));
    result.rstd = empty(x, {B, N}, accumulator_of(x));
    check_same_precision(x, result.n, "out_dtype");
  }
  NormModulateForward a{};
  a.B = B, a.N = N, a.C = C, a.eps = eps;
  a.x = in(x, "x"), a.x_stride_b = x.stride(0), a.x_stride_n = x.stride(1);
  a.y = in(y, "y"), a.y_stride_b = stride(y, 0), a.y_stride_n = stride(y, 1);
  a.gate = in(gate, "gate"), a.gate_stride_b = stride(gate, 0);
  a.shift = in(shift, "shift"), a.shift_stride_b = stride(shift, 0);
  a.scale = in(scale, "scale"), a.scale_stride_b = stride(scale, 0);
  if (y) a.z = out(result.z);
  if (scale) {
    a.n = out(result.n);
    a.mean = result.mean.mutable_data_ptr(), a.rstd = result.rstd.mutable_data_ptr();
  }
  if (C > 0) parallel(norm_modulate_forward, a, B * N, kGrainElements / C);
  return result;
}

struct Backward {
  Tensor dx, dy, dgate, dshift, dscale;
};

Backward run_backward(const OptionalTensor& dz_in, const OptionalTensor& dn_in, const OptionalTensor& z_in,
                      const OptionalTensor& y_in, const OptionalTensor& gate_in, const OptionalTensor& scale_in,
                      const OptionalTensor& mean_in, const OptionalTensor& rstd_in, bool want_dx, ScalarType x_dtype,
                      ScalarType y_dtype, ScalarType shift_dtype) {
  const Tensor& first = dz_in ? *dz_in : *dn_in;
  check(first.dim() == 3, "the gradient must have shape [B, N, C]");
  const int64_t B = first.size(0), N = first.size(1), C = first.size(2);
  for (const auto* t : {&dz_in, &dn_in, &z_in, &y_in}) check_shape(*t, "every row argument", {B, N, C});
  for (const auto* t : {&gate_in, &scale_in}) check_shape(*t, "gate and scale", {B, C});
  for (const auto* t : {&mean_in, &rstd_in}) check_shape(*t, "mean and rstd", {B, N});
  for (const auto* t : {&dn_in, &z_in, &y_in, &gate_in, &scale_in, &mean_in, &rstd_in})
    check_same_precision(first, *t, "every argument");
  check(!dn_in || (z_in && scale_in && mean_in && rstd_in), "dn needs z, scale, mean and rstd");
  check(!gate_in || y_in, "gate needs y");
  const OptionalTensor dz = dense_rows(dz_in), dn = dense_rows(dn_in), z = dense_rows(z_in), y = dense_rows(y_in),
                       gate = dense_rows(gate_in), scale = dense_rows(scale_in);
  const ScalarType acc = accumulator_of(first);
  const bool want_dy = bool(y);
  Backward result{none(first), none(first), none(first), none(first), none(first)};
  if (want_dx) result.dx = empty(first, {B, N, C}, x_dtype);
  if (want_dy) result.dy = empty(first, {B, N, C}, y_dtype);
  if (gate) result.dgate = empty(first, {B, C}, gate->scalar_type());
  if (dn) {
    result.dshift = empty(first, {B, C}, shift_dtype);
    check_same_precision(first, result.dshift, "shift_dtype");
    result.dscale = empty(first, {B, C}, scale->scalar_type());
  }
  const int64_t blocks = (N + kNormModulateBlock - 1) / kNormModulateBlock;
  Tensor partial = empty(first, {B, blocks, 3, C}, acc);
  const OptionalTensor mean = dense(mean_in);
  const OptionalTensor rstd = dense(rstd_in);
  NormModulateBackward a{};
  a.B = B, a.N = N, a.C = C, a.fp64 = is_fp64(first);
  a.dz = in(dz, "dz"), a.dz_stride_b = stride(dz, 0), a.dz_stride_n = stride(dz, 1);
  a.dn = in(dn, "dn"), a.dn_stride_b = stride(dn, 0), a.dn_stride_n = stride(dn, 1);
  a.z = in(z, "z"), a.z_stride_b = stride(z, 0), a.z_stride_n = stride(z, 1);
  a.y = in(y, "y"), a.y_stride_b = stride(y, 0), a.y_stride_n = stride(y, 1);
  a.gate = in(gate, "gate"), a.gate_stride_b = stride(gate, 0);
  a.scale = in(scale, "scale"), a.scale_stride_b = stride(scale, 0);
  a.mean = mean ? mean->const_data_ptr() : nullptr, a.rstd = rstd ? rstd->const_data_ptr() : nullptr;
  if (want_dx) a.dx = out(result.dx);
  if (want_dy) a.dy = out(result.dy);
  a.partial = partial.mutable_data_ptr();
  if (C > 0) parallel(norm_modulate_backward, a, B * blocks, kGrainElements / (C * kNormModulateBlock));
  PartialSums s{};
  s.B = B, s.blocks = blocks, s.R = 3, s.C = C, s.partial = a.partial, s.fp64 = a.fp64;
  if (dn) s.out[0] = out(result.dshift), s.out[1] = out(result.dscale);
  if (gate) s.out[2] = out(result.dgate);
  if (C > 0) parallel(sum_partials, s, B * 3, kGrainElements / (C * (blocks + 1)));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate_forward_cpu(const Tensor& x, const Tensor& shift, const Tensor& scale,
                                                             double eps, ScalarType out_dtype) {
  auto r = run_forward(x, std::nullopt, std::nullopt, shift, scale, eps, out_dtype);
  return {r.n, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor> norm_modulate_backward_cpu(const Tensor& dn, const Tensor& x, const Tensor& scale,
                                                              const Tensor& mean, const Tensor& rstd,
                                                              ScalarType shift_dtype) {
  auto r = run_backward(std::nullopt, dn, x, std::nullopt, std::nullopt, scale, mean, rstd, true, x.scalar_type(),
                        x.scalar_type(), shift_dtype);
  return {r.dx, r.dshift, r.dscale};
}

Tensor gated_residual_forward_cpu(const Tensor& x, const Tensor& y, const Tensor& gate) {
  return run_forward(x, y, gate, std::nullopt, std::nullopt, 0.0, std::nullopt).z;
}

std::tuple<Tensor, Tensor> gated_residual_backward_cpu(const Tensor& dout, const Tensor& y, const Tensor& gate) {
  auto r = run_backward(dout, std::nullopt, std::nullopt, y, gate, std::nullopt, std::nullopt, std::nullopt, false,
                        dout.scalar_type(), y.scalar_type(), dout.scalar_type());
  return {r.dy, r.dgate};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> residual_norm_modulate_forward_cpu(const Tensor& x, const Tensor& y,
                                                                              const OptionalTensor& gate,
                                                                              const Tensor& shift, const Tensor& scale,
                                                                              double eps, ScalarType out_dtype) {
  auto r = run_forward(x, y, gate, shift, scale, eps, out_dtype);
  return {r.z, r.n, r.mean, r.rstd};
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> residual_norm_modulate_backward_cpu(
    const Tensor& dz, const Tensor& dn, const Tensor& z, const Tensor& y, const OptionalTensor& gate,
    const Tensor& scale, const Tensor& mean, const Tensor& rstd, ScalarType shift_dtype) {
  auto r = run_backward(dz, dn, z, y, gate, scale, mean, rstd, true, z.scalar_type(), y.scalar_type(), shift_dtype);
  return {r.dx, r.dy, r.dgate, r.dshift, r.dscale};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) {
  m.impl("norm_modulate_forward", TORCH_BOX(&norm_modulate_forward_cpu));
  m.impl("norm_modulate_backward", TORCH_BOX(&norm_modulate_backward_cpu));
  m.impl("gated_residual_forward", TORCH_BOX(&gated_residual_forward_cpu));
  m.impl("gated_residual_backward", TORCH_BOX(&gated_residual_backward_cpu));
  m.impl("residual_norm_modulate_forward", TORCH_BOX(&residual_norm_modulate_forward_cpu));
  m.impl("residual_norm_modulate_backward", TORCH_BOX(&residual_norm_modulate_backward_cpu));
}

}  // namespace sana_ext::cpu
