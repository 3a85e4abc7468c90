// CUDA glue of dwconv_glu.
#include "../glue/glumbconv.h"

#include "glue.h"
#include "kernels/dwconv_glu.h"

namespace sana_ext::cuda {
namespace {

// What the kernels count in 32 bits.
void check_sizes(const Tensor& u, int64_t height, int64_t width) {
  constexpr int64_t kLimit = int64_t{1} << 31;
  const int64_t F = u.size(2) / 2;
  check(height < kLimit && width < kLimit, "height and width must be below 2^31");
  check(dwconv_glu_backward_cut(u.size(0), height, width, F).blocks(u.size(0)) < kLimit, "u has too many images");
}

Tensor dwconv_glu_forward_cuda(const Tensor& u_in, const Tensor& weight_in, const OptionalTensor& bias_in,
                               int64_t height, int64_t width) {
  glue::check_dwconv_glu(u_in, weight_in, bias_in, height, width);
  check_sizes(u_in, height, width);
  Launch launch(u_in);
  const Tensor u = dense_rows(u_in), weight = glue::dense(weight_in);
  const OptionalTensor bias = glue::dense(bias_in);
  DwconvGluForward a{};
  a.B = u.size(0), a.H = height, a.W = width, a.F = u.size(2) / 2;
  Tensor result = empty(u, {a.B, height * width, a.F}, u.scalar_type());
  a.u = launch.in(u, "u"), a.u_stride_b = u.stride(0), a.u_stride_n = u.stride(1);
  a.weight = launch.in(weight, "weight"), a.bias = launch.in(bias, "bias");
  a.out = launch.out(result, "out");
  Launch::succeeded(dwconv_glu_forward(a, launch.stream()), "dwconv_glu_forward");
  return result;
}

std::tuple<Tensor, Tensor, Tensor> dwconv_glu_backward_cuda(const Tensor& dout_in, const Tensor& u_in,
                                                            const Tensor& weight_in, const OptionalTensor& bias_in,
                                                            int64_t height, int64_t width, bool parameter_grads) {
  glue::check_dwconv_glu(u_in, weight_in, bias_in, height, width);
  glue::check_dwconv_glu_gradient(dout_in, u_in);
  check_sizes(u_in, height, width);
  Launch launch(u_in);
  const Tensor dout = dense_rows(dout_in), u = dense_rows(u_in), weight = glue::dense(weight_in);
  const OptionalTensor bias = glue::dense(bias_in);
  DwconvGluBackward a{};
  a.B = u.size(0), a.H = height, a.W = width, a.F = u.size(2) / 2;
  // Absent outputs are tensors of no elements, as in the schema's other kernels.
  const ScalarType fp32 = ScalarType::Float;
  Tensor du = empty(u, {a.B, height * width, 2 * a.F}, u.scalar_type()), dweight = empty(u, {0}, fp32),
         dbias = empty(u, {0}, fp32), partial = empty(u, {0}, fp32);
  a.dout = launch.in(dout, "dout"), a.dout_stride_b = dout.stride(0), a.dout_stride_n = dout.stride(1);
  a.u = launch.in(u, "u"), a.u_stride_b = u.stride(0), a.u_stride_n = u.stride(1);
  a.weight = launch.in(weight, "weight"), a.bias = launch.in(bias, "bias");
  a.du = launch.out(du, "du");
  DwconvGluSums s{};
  if (parameter_grads) {
    const DwconvGluCut cut = dwconv_glu_backward_cut(a.B, a.H, a.W, a.F);
    s.parts = a.B * cut.strips * cut.tiles, s.channels = 2 * a.F;
    partial = empty(u, {s.parts, 10, s.channels}, fp32);
    dweight = empty(u, {s.channels, 1, 3, 3}, weight.scalar_type());
    s.partial = a.partial = launch.out_fp32(partial, "partial");
    s.dweight = launch.out(dweight, "dweight");
    if (bias) {
      dbias = empty(u, {s.channels}, bias->scalar_type());
      s.dbias = launch.out(dbias, "dbias");
    }
  }
  Launch::succeeded(dwconv_glu_backward(a, launch.stream()), "dwconv_glu_backward");
  if (parameter_grads) Launch::succeeded(dwconv_glu_sums(s, launch.stream()), "dwconv_glu_sums");
  return {du, dweight, dbias};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, SANA_EXT_DEVICE, m) {
  m.impl("dwconv_glu_forward", TORCH_BOX(&dwconv_glu_forward_cuda));
  m.impl("dwconv_glu_backward", TORCH_BOX(&dwconv_glu_backward_cuda));
}

}  // namespace sana_ext::cuda
