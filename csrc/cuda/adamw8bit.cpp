// CUDA glue of adamw8bit.
#include "kernels/adamw8bit.h"

#include <vector>

#include "glue.h"

namespace sana_ext::cuda {
namespace {

using Tensors = std::vector<Tensor>;

void check_dense(const Tensor& t, const char* name, int64_t elements) {
  check(t.is_contiguous(), name, " must be contiguous");
  check(t.numel() == elements, name, " must have ", elements, " elements, got ", t.numel());
}

bool is_bf16(const Tensor& t, const char* name) {
  const bool bf16 = t.scalar_type() == ScalarType::BFloat16;
  check(bf16 || t.scalar_type() == ScalarType::Float, name, " must be float32 or bfloat16");
  return bf16;
}

bool aligned(std::initializer_list<const void*> pointers) {
  for (const void* p : pointers)
    if (reinterpret_cast<uintptr_t>(p) % 16 != 0) return false;
  return true;
}

int64_t blocks_of(int64_t elements) { return (elements + kAdamW8bitBlock - 1) / kAdamW8bitBlock; }
int64_t chunks_of(int64_t blocks) { return (blocks + kAdamW8bitChunk - 1) / kAdamW8bitChunk; }

float* one_number(Launch& launch, const Tensor& t, const char* name) {
  check(t.scalar_type() == ScalarType::Float && t.numel() == 1, name, " must be one float32 number");
  return static_cast<float*>(launch.out_raw(t, name));
}

float* scales(Launch& launch, const Tensor& t, const char* name, int64_t elements) {
  check(t.scalar_type() == ScalarType::Float, name, " must be float32");
  check_dense(t, name, blocks_of(elements));
  return static_cast<float*>(launch.out_raw(t, name));
}

// Calls run(launch arguments, first parameter) for as many parameters at a time as fit.
template <class Fill, class Run>
void in_launches(int64_t count, const Fill& fill, const Run& run) {
  for (int64_t first = 0; first < count; first += kAdamW8bitTensors) {
    AdamW8bitLaunch a{};
    int64_t blocks = 0;
    for (int64_t i = first; i < count && i < first + kAdamW8bitTensors; ++i) {
      AdamW8bitTensor& t = a.tensors[a.count++];
      fill(t, static_cast<size_t>(i));
      t.first_block = static_cast<uint32_t>(blocks);
      blocks += blocks_of(t.n);
    }
    check(blocks < int64_t{1} << 31, "more than 2^39 values in one call");
    a.blocks = static_cast<uint32_t>(blocks);
    run(a, first);
  }
}

void adamw8bit_check_cuda(const Tensors& grads, const Tensor& factor, const Tensor& found_inf) {
  if (grads.empty()) return;
  Launch launch(found_inf);
  const float* factor_data = one_number(launch, factor, "factor");
  float* found = one_number(launch, found_inf, "found_inf");
  int64_t most = 0;
  for (const Tensor& g : grads) most += chunks_of(blocks_of(g.numel()));
  Tensor flags = empty(found_inf, {most + 1}, ScalarType::Int);
  auto* flag = static_cast<int32_t*>(launch.out_raw(flags, "flags"));
  int64_t used = 0;
  in_launches(
      static_cast<int64_t>(grads.size()),
      [&](AdamW8bitTensor& t, size_t i) {
        t.n = grads[i].numel(), t.g_bf16 = is_bf16(grads[i], "grads");
        check_dense(grads[i], "grads", t.n);
        t.g = launch.in_raw(grads[i], "grads"), t.aligned = aligned({t.g});
      },
      [&](AdamW8bitLaunch& a, int64_t) {
        a.factor = factor_data, a.flags = flag + used;
        used += chunks_of(a.blocks);
        Launch::succeeded(adamw8bit_check(a, launch.stream()), "adamw8bit_check");
      });
  Launch::succeeded(adamw8bit_found({used, flag, found}, launch.stream()), "adamw8bit_found");
}

void adamw8bit_step_cuda(const Tensors& params, const Tensors& grads, const Tensors& state1, const Tensors& state2,
                         const Tensors& absmax1, const Tensors& absmax2, const Tensor& hyper,
                         const OptionalTensor& seeds, const Tensor& found_inf, bool bitsandbytes_cuda) {
  const size_t count = params.size();
  for (const Tensors* list : {&grads, &state1, &state2, &absmax1, &absmax2})
    check(list->size() == count, "every list must have one tensor per parameter");
  const auto n = static_cast<int64_t>(count);
  check(hyper.scalar_type() == ScalarType::Double && hyper.is_contiguous(), "hyper must be dense float64");
  check_shape(hyper, "hyper", {n, kAdamW8bitColumns});
  check(!seeds || (seeds->scalar_type() == ScalarType::Long && seeds->is_contiguous()), "seeds must be dense int64");
  check_shape(seeds, "seeds", {n});
  if (count == 0) return;
  Launch launch(found_inf);
  const float* found = one_number(launch, found_inf, "found_inf");
  const auto* numbers = static_cast<const double*>(launch.in_raw(hyper, "hyper"));
  const auto* draws = seeds ? static_cast<const int64_t*>(launch.in_raw(*seeds, "seeds")) : nullptr;
  in_launches(
      n,
      [&](AdamW8bitTensor& t, size_t i) {
        t.n = params[i].numel();
        t.p_bf16 = is_bf16(params[i], "params"), t.g_bf16 = is_bf16(grads[i], "grads");
        check_dense(params[i], "params", t.n), check_dense(grads[i], "grads", t.n);
        check_dense(state1[i], "state1", t.n), check_dense(state2[i], "state2", t.n);
        check(state1[i].scalar_type() == state2[i].scalar_type(), "state1 and state2 must share one dtype");
        t.p = launch.out_raw(params[i], "params"), t.g = launch.in_raw(grads[i], "grads");
        t.state1 = launch.out_raw(state1[i], "state1"), t.state2 = launch.out_raw(state2[i], "state2");
        t.aligned = aligned({t.p, t.g, t.state1, t.state2});
        if (state1[i].scalar_type() == ScalarType::Byte)
          t.absmax1 = scales(launch, absmax1[i], "absmax1", t.n),
          t.absmax2 = scales(launch, absmax2[i], "absmax2", t.n);
        else
          check(state1[i].scalar_type() == ScalarType::Float, "states must be uint8 or float32");
      },
      [&](AdamW8bitLaunch& a, int64_t first) {
        a.hyper = numbers + first * kAdamW8bitColumns, a.seeds = draws ? draws + first : nullptr;
        a.found_inf = found, a.bitsandbytes_cuda = bitsandbytes_cuda;
        Launch::succeeded(adamw8bit_step(a, launch.stream()), "adamw8bit_step");
      });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, SANA_EXT_DEVICE, m) {
  m.impl("adamw8bit_check", TORCH_BOX(&adamw8bit_check_cuda));
  m.impl("adamw8bit_step", TORCH_BOX(&adamw8bit_step_cuda));
}

}  // namespace sana_ext::cuda
