#include "kernels/adamw8bit.h"

#include <vector>

#include "glue.h"

namespace sana_ext::cpu {
namespace {

using Tensors = std::vector<Tensor>;

Dtype float_dtype(const Tensor& t, const char* name) {
  const Dtype dtype = dtype_of(t, name);
  check(dtype == Dtype::kFloat32 || dtype == Dtype::kBFloat16, name, " must be float32 or bfloat16");
  return dtype;
}

void check_dense(const Tensor& t, const char* name, int64_t elements) {
  check(t.is_contiguous(), name, " must be contiguous");
  check(t.numel() == elements, name, " must have ", elements, " elements, got ", t.numel());
}

int64_t blocks_of(int64_t elements) { return (elements + kAdamW8bitBlock - 1) / kAdamW8bitBlock; }

float* scales(const Tensor& t, const char* name, int64_t elements) {
  check(t.scalar_type() == ScalarType::Float, name, " must be float32");
  check_dense(t, name, blocks_of(elements));
  return static_cast<float*>(t.mutable_data_ptr());
}

// A call's 50 us of work are 128 blocks.
constexpr int64_t kGrainBlocks = kGrainElements / kAdamW8bitBlock;

void adamw8bit_check_cpu(const Tensors& grads, const Tensor& factor, const Tensor& found_inf) {
  check(factor.scalar_type() == ScalarType::Float && factor.numel() == 1, "factor must be one float32 number");
  check(found_inf.scalar_type() == ScalarType::Float && found_inf.numel() == 1, "found_inf must be one float32 number");
  std::vector<AdamW8bitTensor> table;
  int64_t blocks = 0;
  for (const Tensor& g : grads) {
    AdamW8bitTensor t{};
    t.n = g.numel(), t.first_block = blocks, t.g = {g.const_data_ptr(), float_dtype(g, "grads")};
    check_dense(g, "grads", t.n);
    blocks += blocks_of(t.n);
    if (t.n > 0) table.push_back(t);
  }
  int32_t found = 0;
  AdamW8bitCheck a{};
  a.count = static_cast<int64_t>(table.size()), a.tensors = table.data(), a.found = &found;
  a.factor = *static_cast<const float*>(factor.const_data_ptr());
  parallel(adamw8bit_check, a, blocks, kGrainBlocks);
  if (found != 0) *static_cast<float*>(found_inf.mutable_data_ptr()) = 1.0f;
}

void adamw8bit_step_cpu(const Tensors& params, const Tensors& grads, const Tensors& state1, const Tensors& state2,
                        const Tensors& absmax1, const Tensors& absmax2, const Tensor& hyper,
                        const OptionalTensor& seeds, const Tensor& found_inf, bool bitsandbytes_cuda) {
  const size_t count = params.size();
  for (const Tensors* list : {&grads, &state1, &state2, &absmax1, &absmax2})
    check(list->size() == count, "every list must have one tensor per parameter");
  const auto n = static_cast<int64_t>(count);
  check(hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(), "hyper must be dense float64");
  check_shape(hyper, "hyper", {n, 9});
  check(!seeds || (seeds->scalar_type() == ScalarType::Long && seeds->is_contiguous()), "seeds must be dense int64");
  check_shape(seeds, "seeds", {n});
  check(found_inf.scalar_type() == ScalarType::Float && found_inf.numel() == 1, "found_inf must be one float32 number");
  if (*static_cast<const float*>(found_inf.const_data_ptr()) != 0) return;

  std::vector<AdamW8bitTensor> table;
  table.reserve(count);
  int64_t blocks = 0;
  for (size_t i = 0; i < count; ++i) {
    AdamW8bitTensor t{};
    t.n = params[i].numel(), t.first_block = blocks;
    t.p = {params[i].mutable_data_ptr(), float_dtype(params[i], "params")};
    t.g = {grads[i].const_data_ptr(), float_dtype(grads[i], "grads")};
    check_dense(params[i], "params", t.n), check_dense(grads[i], "grads", t.n);
    check_dense(state1[i], "state1", t.n), check_dense(state2[i], "state2", t.n);
    check(state1[i].scalar_type() == state2[i].scalar_type(), "state1 and state2 must share one dtype");
    t.state1 = state1[i].mutable_data_ptr(), t.state2 = state2[i].mutable_data_ptr();
    if (state1[i].scalar_type() == ScalarType::Byte)
      t.absmax1 = scales(absmax1[i], "absmax1", t.n), t.absmax2 = scales(absmax2[i], "absmax2", t.n);
    else
      check(state1[i].scalar_type() == ScalarType::Float, "states must be uint8 or float32");
    const double* h = static_cast<const double*>(hyper.const_data_ptr()) + 9 * i;
    float* numbers[] = {&t.h.beta1, &t.h.rest1, &t.h.beta2, &t.h.rest2, &t.h.size,
                        &t.h.root,  &t.h.eps,   &t.h.keep,  &t.h.factor};
    for (int column = 0; column < 9; ++column) *numbers[column] = static_cast<float>(h[column]);
    t.seed = seeds ? static_cast<const int64_t*>(seeds->const_data_ptr())[i] : -1;
    blocks += blocks_of(t.n);
    if (t.n > 0) table.push_back(t);
  }
  AdamW8bit a{};
  a.count = static_cast<int64_t>(table.size()), a.tensors = table.data(), a.bitsandbytes_cuda = bitsandbytes_cuda;
  parallel(adamw8bit_step, a, blocks, kGrainBlocks);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) {
  m.impl("adamw8bit_check", TORCH_BOX(&adamw8bit_check_cpu));
  m.impl("adamw8bit_step", TORCH_BOX(&adamw8bit_step_cpu));
}

}  // namespace sana_ext::cpu
