#include "../glue/glumbconv.h"

#include "glue.h"
#include "kernels/dwconv_glu.h"

namespace sana_ext::cpu {
namespace {

int64_t grain(int64_t items, int64_t elements) { return items * kGrainElements / (elements + 1); }

Tensor dwconv_glu_forward_cpu(const Tensor& u_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                              int64_t height, int64_t width) {
  check_dwconv_glu(u_in, weight_in, bias_in, height, width);
  const Tensor u = dense_rows(u_in), weight = dense(weight_in);
  const OptionalTensor bias = dense(bias_in);
  const int64_t B = u.size(0), N = u.size(1), F = u.size(2) / 2;
  Tensor result = empty(u, {B, N, F}, u.scalar_type());
  DwconvGluForward a{};
  a.B = B, a.H = height, a.W = width, a.F = F, a.strips = dwconv_glu_strips(B, height, F);
  a.u = in(u, "u"), a.u_stride_b = u.stride(0), a.u_stride_n = u.stride(1);
  a.weight = in(weight, "weight"), a.bias = in(bias, "bias");
  a.out = out(result);
  const int64_t items = B * a.strips * dwconv_glu_blocks(F);
  parallel(dwconv_glu_forward, a, items, grain(items, result.numel()));
  return result;
}

std::tuple<Tensor, Tensor, Tensor> dwconv_glu_backward_cpu(const Tensor& dout_in, const Tensor& u_in,
                                                           const Tensor& weight_in, const OptionalTensor& bias_in,
                                                           int64_t height, int64_t width, bool parameter_grads) {
  check_dwconv_glu(u_in, weight_in, bias_in, height, width);
  check_dwconv_glu_gradient(dout_in, u_in);
  const int64_t B = u_in.size(0), N = u_in.size(1), F = u_in.size(2) / 2;
  const Tensor dout = dense_rows(dout_in), u = dense_rows(u_in), weight = dense(weight_in);
  const OptionalTensor bias = dense(bias_in);
  const ScalarType acc = accumulator_of(u);
  // Absent outputs are tensors of no elements, as in the schema's other kernels.
  Tensor du = empty(u, {B, N, 2 * F}, u.scalar_type()), dweight = empty(u, {0}, acc), dbias = empty(u, {0}, acc),
         partial = empty(u, {0}, acc);
  DwconvGluBackward a{};
  a.B = B, a.H = height, a.W = width, a.F = F, a.strips = dwconv_glu_strips(B, height, F);
  a.dout = in(dout, "dout"), a.dout_stride_b = dout.stride(0), a.dout_stride_n = dout.stride(1);
  a.u = in(u, "u"), a.u_stride_b = u.stride(0), a.u_stride_n = u.stride(1);
  a.weight = in(weight, "weight"), a.bias = in(bias, "bias");
  a.du = out(du);
  DwconvGluReduce r{};
  if (parameter_grads) {
    partial = empty(u, {B, a.strips, 10, 2 * F}, acc);
    dweight = empty(u, {2 * F, 1, 3, 3}, weight.scalar_type());
    a.partial = partial.mutable_data_ptr();
    r.parts = B * a.strips, r.channels = 2 * F, r.partial = a.partial, r.dweight = out(dweight);
    if (bias) {
      dbias = empty(u, {2 * F}, bias->scalar_type());
      r.dbias = out(dbias);
    }
  }
  const int64_t items = B * a.strips * dwconv_glu_blocks(F);
  parallel(dwconv_glu_backward, a, items, grain(items, 2 * du.numel()));
  if (parameter_grads)
    parallel(dwconv_glu_reduce, r, dwconv_glu_blocks(2 * F), grain(dwconv_glu_blocks(2 * F), partial.numel()));
  return {du, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) {
  m.impl("dwconv_glu_forward", TORCH_BOX(&dwconv_glu_forward_cpu));
  m.impl("dwconv_glu_backward", TORCH_BOX(&dwconv_glu_backward_cpu));
}

}  // namespace sana_ext::cpu
