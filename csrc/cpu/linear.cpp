// linear in fp32 arithmetic for CPUs without 16-bit arithmetic: operands are converted a panel at a time into scratch,
// the products are torch's own fp32 matrix products, and every result is rounded once.
#include "kernels/linear.h"

#include <algorithm>
#include <array>

#include "glue.h"
#include "kernels/convert.h"
#include "kernels/norm_modulate.h"  // sum_partials

namespace sana_ext::cpu {
namespace {

constexpr int64_t kFewRows = 32;     // up to here reading the weight once beats converting it
constexpr int64_t kPanel = 512;      // rows or columns of the weight per product
constexpr int64_t kRowBlock = 1024;  // rows of x held as accumulators at a time

// How [0, size) is cut into equal steps of at most `limit`.
int64_t step(int64_t size, int64_t limit) {
  const int64_t count = std::max<int64_t>(1, (size + limit - 1) / limit);
  return (size + count - 1) / count;
}

void run_convert(const Convert& a) { parallel(convert, a, a.rows, kGrainElements / std::max<int64_t>(1, a.cols)); }

const void* data_at(const Tensor& t, int64_t offset) {
  return static_cast<const char*>(t.const_data_ptr()) + offset * size_of(dtype_of(t, "tensor"));
}

// Rows [r, r + rows) and columns [c, c + cols) of `t` as accumulators, in the top left corner of `scratch`.
Tensor widen(const Tensor& t, int64_t r, int64_t rows, int64_t c, int64_t cols, Tensor& scratch) {
  const int64_t offset = r * t.stride(0) + c * t.stride(1);
  run_convert({rows,
               cols,
               {data_at(t, offset), dtype_of(t, "tensor")},
               t.stride(0),
               nullptr,
               0,
               out(scratch),
               scratch.stride(0)});
  Tensor part = scratch;
  if (rows < scratch.size(0)) part = torch::stable::narrow(part, 0, 0, rows);
  if (cols < scratch.size(1)) part = torch::stable::narrow(part, 1, 0, cols);
  return part;
}

// Stores `source` (accumulators) + `addend` into `target` at row r, column c.
void narrow_into(Tensor& target, int64_t r, int64_t c, const Tensor& source, const void* addend,
                 int64_t addend_stride) {
  char* data = static_cast<char*>(target.mutable_data_ptr());
  const Dtype dtype = dtype_of(target, "target");
  data += (r * target.stride(0) + c) * size_of(dtype);
  run_convert({source.size(0),
               source.size(1),
               in(source, "source"),
               source.stride(0),
               addend,
               addend_stride,
               {data, dtype},
               target.stride(0)});
}

// out = a b in the accumulator type, by torch.
void multiply(Tensor& out, const Tensor& a, const Tensor& b) {
  using torch::stable::detail::from;
  std::array<StableIValue, 3> stack{from(a), from(b), from(out)};
  check(torch_call_dispatcher("aten::mm", "out", stack.data(), TORCH_ABI_VERSION) == AOTI_TORCH_SUCCESS,
        "aten::mm.out failed");
  (void)torch::stable::detail::to<Tensor>(stack[0]);  // the returned handle is ours to release
}

Tensor corner(Tensor t, int64_t rows, int64_t cols) {
  t = torch::stable::narrow(t, 0, 0, rows);
  return torch::stable::narrow(t, 1, 0, cols);
}

// y [M, F] = a [M, R] times the weight: its rows [F, R] (transposed == false) or its columns [R, F] (transposed ==
// true).
void product(Tensor& y, const Tensor& a, const Tensor& weight, bool transposed, const void* bias) {
  const int64_t M = a.size(0), R = a.size(1), F = y.size(1);
  const ScalarType acc = accumulator_of(a);
  const int64_t block = step(M, kRowBlock), panel = step(F, kPanel);
  Tensor a_acc = empty(a, {block, R}, acc), y_acc = empty(a, {block, panel}, acc);
  Tensor w_acc = transposed ? empty(a, {R, panel}, acc) : empty(a, {panel, R}, acc);
  for (int64_t m = 0; m < M; m += block) {
    const int64_t rows = std::min(block, M - m);
    const Tensor left = widen(a, m, rows, 0, R, a_acc);
    for (int64_t f = 0; f < F; f += panel) {
      const int64_t cols = std::min(panel, F - f);
      const Tensor right = transposed ? widen(weight, 0, R, f, cols, w_acc)
                                      : torch::stable::transpose(widen(weight, f, cols, 0, R, w_acc), 0, 1);
      Tensor result = corner(y_acc, rows, cols);
      multiply(result, left, right);
      const auto* b = static_cast<const char*>(bias);
      narrow_into(y, m, f, result, b ? b + f * (is_fp64(a) ? 8 : 4) : nullptr, 0);
    }
  }
}

// dweight [F, K] = dy^T x. The sum over blocks of rows stays in the accumulator type.
void weight_gradient(Tensor& dweight, const Tensor& dy, const Tensor& x) {
  const int64_t M = x.size(0), K = x.size(1), F = dy.size(1);
  const ScalarType acc = accumulator_of(x);
  const int64_t block = step(M, kRowBlock), panel = step(F, kPanel);
  Tensor x_acc = empty(x, {block, K}, acc), dy_acc = empty(x, {block, panel}, acc), part = empty(x, {panel, K}, acc);
  Tensor sum = empty(x, {block < M ? panel : 0, K}, acc);
  for (int64_t f = 0; f < F; f += panel) {
    const int64_t cols = std::min(panel, F - f);
    for (int64_t m = 0; m < M; m += block) {
      const int64_t rows = std::min(block, M - m);
      // With a single block of rows x stays converted from the first panel on.
      const Tensor right = f > 0 && block == M ? x_acc : widen(x, m, rows, 0, K, x_acc);
      Tensor result = corner(part, cols, K);
      multiply(result, torch::stable::transpose(widen(dy, m, rows, f, cols, dy_acc), 0, 1), right);
      const void* before = m > 0 ? sum.const_data_ptr() : nullptr;
      if (m + rows < M) {
        narrow_into(sum, 0, 0, result, before, K);
      } else {
        narrow_into(dweight, f, 0, result, before, K);
      }
    }
  }
}

void bias_gradient(Tensor& dbias, const Tensor& dy) {
  const int64_t M = dy.size(0), F = dy.size(1), blocks = (M + kColumnSumsBlock - 1) / kColumnSumsBlock;
  Tensor partial = empty(dy, {blocks, F}, accumulator_of(dy));
  const ColumnSums sums{M, F, in(dy, "dy"), dy.stride(0), partial.mutable_data_ptr()};
  parallel(column_sums, sums, blocks, kGrainElements / (F * kColumnSumsBlock));
  PartialSums total{};
  total.B = 1, total.blocks = blocks, total.R = 1, total.C = F;
  total.partial = partial.const_data_ptr(), total.out[0] = out(dbias), total.fp64 = is_fp64(dy);
  parallel(sum_partials, total, 1, 1);
}

void check_matrix(const Tensor& t, const char* name, const Tensor& like) {
  check(t.dim() == 2, name, " must have two dimensions");
  check(t.scalar_type() == like.scalar_type(), name, " must have the dtype of the first argument");
}

Tensor linear_forward_cpu(const Tensor& x_in, const Tensor& weight_in, const OptionalTensor& bias_in) {
  check_matrix(x_in, "x", x_in);
  check_matrix(weight_in, "weight", x_in);
  const int64_t M = x_in.size(0), K = x_in.size(1), F = weight_in.size(0);
  check_shape(weight_in, "weight", {F, K});
  check_shape(bias_in, "bias", {F});
  if (bias_in) check(bias_in->scalar_type() == x_in.scalar_type(), "bias must have the dtype of the first argument");
  const Tensor x = dense_rows(x_in), weight = dense_rows(weight_in);
  const ScalarType acc = accumulator_of(x);
  Tensor y = empty(x, {M, F}, x.scalar_type());
  if (M == 0 || F == 0) return y;

  Tensor bias_acc = empty(x, {1, bias_in ? F : 0}, acc);
  if (bias_in) {
    const Tensor bias = dense(*bias_in);
    run_convert({1, F, in(bias, "bias"), F, nullptr, 0, out(bias_acc), F});
  }
  const void* bias = bias_in ? bias_acc.const_data_ptr() : nullptr;
  if (M > kFewRows) {
    product(y, x, weight, false, bias);
    return y;
  }
  Tensor x_acc = empty(x, {M, K}, acc);
  widen(x, 0, M, 0, K, x_acc);
  const LinearFewRows a{M,    K,      F,         x_acc.const_data_ptr(), in(weight, "weight"), weight.stride(0),
                        bias, out(y), is_fp64(x)};
  parallel(linear_few_rows, a, (F + kLinearBlock - 1) / kLinearBlock,
           kGrainElements / (kLinearBlock * std::max<int64_t>(1, K)));
  return y;
}

std::tuple<Tensor, Tensor, Tensor> linear_backward_cpu(const Tensor& dy_in, const OptionalTensor& x_in,
                                                       const OptionalTensor& weight_in, bool want_bias) {
  check_matrix(dy_in, "dy", dy_in);
  const int64_t M = dy_in.size(0), F = dy_in.size(1);
  const ScalarType dtype = dy_in.scalar_type();
  const Tensor dy = dense_rows(dy_in);
  Tensor dx = empty(dy, {0}, dtype), dweight = empty(dy, {0}, dtype), dbias = empty(dy, {0}, dtype);
  if (weight_in) {
    check_matrix(*weight_in, "weight", dy);
    check_shape(weight_in, "weight", {F, weight_in->size(1)});
    dx = empty(dy, {M, weight_in->size(1)}, dtype);
    if (M > 0 && dx.size(1) > 0) product(dx, dy, dense_rows(*weight_in), true, nullptr);
  }
  if (x_in) {
    check_matrix(*x_in, "x", dy);
    check_shape(x_in, "x", {M, x_in->size(1)});
    dweight = empty(dy, {F, x_in->size(1)}, dtype);
    if (M == 0) {
      torch::stable::zero_(dweight);
    } else if (F > 0 && dweight.size(1) > 0) {
      weight_gradient(dweight, dy, dense_rows(*x_in));
    }
  }
  if (want_bias) {
    dbias = empty(dy, {F}, dtype);
    if (F > 0) bias_gradient(dbias, dy);
  }
  return {dx, dweight, dbias};
}

bool native_arithmetic_cpu(ScalarType dtype) {
  if (dtype == ScalarType::BFloat16) return has_native_arithmetic(Dtype::kBFloat16);
  if (dtype == ScalarType::Half) return has_native_arithmetic(Dtype::kFloat16);
  return true;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) {
  m.impl("linear_forward", TORCH_BOX(&linear_forward_cpu));
  m.impl("linear_backward", TORCH_BOX(&linear_backward_cpu));
}

// An op without tensor arguments has no device to dispatch on; this key answers it.
STABLE_TORCH_LIBRARY_IMPL(sana_ext, BackendSelect, m) {
  m.impl("native_arithmetic", TORCH_BOX(&native_arithmetic_cpu));
}

}  // namespace sana_ext::cpu
