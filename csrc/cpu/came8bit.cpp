#include "kernels/came8bit.h"

#include <algorithm>
#include <vector>

#include "glue.h"

namespace sana_ext::cpu {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kGeometry = 6, kHyper = 14;
constexpr int64_t kLeastBlock = 64;          // rows of fewer values share a block
constexpr int64_t kChunkElements = 1 << 17;  // values per item of work: 0.5 MiB of fp32
constexpr int64_t kSmall = 1 << 18;          // up to so many values a parameter is one task

void check_dense(const Tensor& t, const char* name, ScalarType dtype, int64_t elements) {
  check(t.scalar_type() == dtype && t.numel() == elements && t.is_contiguous(), name, " must be contiguous, of ",
        elements, " elements and of the dtype the schema names");
}

template <class T>
T* data(const Tensor& t) {
  return static_cast<T*>(t.mutable_data_ptr());
}

// The tensors of one parameter, checked, as the kernels take them.
Came8bit parameter(const Tensor& p, const Tensor& g, const Tensor& exp_avg, const Tensor& scales, const Tensor& second,
                   const Tensor& col, const Tensor& res_row, const Tensor& res_col, const Tensor& work,
                   const double* hyper, const int64_t* geometry) {
  Came8bit a{};
  a.B = geometry[0], a.R = geometry[1], a.C = geometry[2], a.factored = geometry[3] != 0;
  a.block = geometry[4], a.linear = geometry[5] != 0;
  check(a.B >= 0 && a.R >= 0 && a.C >= 0 && a.block >= 1, "geometry must not be negative");
  check(a.factored || a.B == 1, "geometry: a parameter that is not factored is one matrix");
  const int64_t B = a.B, R = a.R, C = a.C;
  const int64_t least = std::min(kLeastBlock, a.block);
  a.unit_rows = 1;
  if (C > 0 && R > 0 && C < least) {
    while (a.unit_rows * C < least) a.unit_rows *= 2;
    a.unit_rows = std::min(a.unit_rows, R);
  }
  a.units = (R + a.unit_rows - 1) / a.unit_rows;
  const int64_t pieces = std::max<int64_t>(1, C / a.block);
  a.block = (C + pieces - 1) / pieces;
  a.blocks = C > 0 ? (C + a.block - 1) / a.block : 1;
  a.chunk_units = std::max<int64_t>(1, kChunkElements / std::max<int64_t>(1, a.unit_rows * C));
  a.chunks = (a.units + a.chunk_units - 1) / a.chunk_units;

  const ScalarType type = p.scalar_type(), gradient = g.scalar_type();
  check(type == ScalarType::Float || type == ScalarType::BFloat16, "params must be float32 or bfloat16");
  check(gradient == ScalarType::Float || gradient == ScalarType::BFloat16, "grads must be float32 or bfloat16");
  check_dense(p, "params", type, B * R * C);
  check_dense(g, "grads", gradient, B * R * C);
  a.p = {p.mutable_data_ptr(), dtype_of(p, "params")};
  a.g = in(g, "grads");
  if (exp_avg.scalar_type() == ScalarType::Byte) {
    check_dense(exp_avg, "exp_avg", ScalarType::Byte, B * R * C);
    check_dense(scales, "scales", ScalarType::Float, B * a.units * a.blocks * (a.linear ? 2 : 1));
    a.codes = data<uint8_t>(exp_avg), a.scales = data<float>(scales);
  } else {
    check_dense(exp_avg, "exp_avg", ScalarType::Float, B * R * C);
    a.m = data<float>(exp_avg);
  }
  check_dense(second, "second", ScalarType::Float, a.factored ? B * R : R * C);
  a.second = data<float>(second);
  const int64_t f = a.factored ? 1 : 0;
  if (a.factored) {
    check_dense(col, "col", ScalarType::Float, B * C);
    check_dense(res_row, "res_row", ScalarType::Float, B * R);
    check_dense(res_col, "res_col", ScalarType::Float, B * C);
    a.col = data<float>(col), a.res_row = data<float>(res_row), a.res_col = data<float>(res_col);
  }
  check_dense(work, "work", ScalarType::Float, 1 + 2 * f * B * (1 + C + R));
  a.w_total = data<float>(work), a.w_col = a.w_total + f * B, a.w_square = a.w_col + f * B * C;
  a.w_res_total = a.w_square + 1, a.w_res_col = a.w_res_total + f * B;
  a.w_row = a.w_res_col + f * B * C, a.w_res_row = a.w_row + f * B * R;
  double* const to[] = {&a.lr,   &a.weight_decay, &a.beta1,    &a.beta2,    &a.beta3,    &a.eps1, &a.eps2,
                        &a.clip, &a.factor,       &a.correct1, &a.correct2, &a.correct3, &a.rows, &a.numel};
  for (int64_t i = 0; i < kHyper; ++i) *to[i] = hyper[i];
  return a;
}

using Kernel = void (*)(const Came8bit&, int64_t, int64_t);

// One phase of one parameter; run(kernel, a, items) goes through the items.
template <class Run>
void run_phase(Came8bit& a, int64_t phase, float* partial, const Run& run) {
  static const Kernel kernels[] = {came8bit_squares, came8bit_norm, came8bit_residual, came8bit_apply};
  a.partial = a.chunks == 1 ? (phase == 0 ? a.w_col : a.w_res_col) : partial;
  came8bit_before(a, phase, phase + 1);
  run(kernels[phase], a, a.B * a.chunks);
  came8bit_after(a, phase, phase + 1);
}

void came8bit_step_cpu(Tensors params, Tensors grads, Tensors exp_avg, Tensors scales, Tensors second, Tensors col,
                       Tensors res_row, Tensors res_col, Tensors work, const Tensor& hyper, const OptionalTensor& seeds,
                       const Tensor& found_inf, std::vector<int64_t> geometry, int64_t first, int64_t last) {
  const int64_t T = static_cast<int64_t>(params.size());
  for (const Tensors* list : {&grads, &exp_avg, &scales, &second, &col, &res_row, &res_col, &work})
    check(static_cast<int64_t>(list->size()) == T, "every list must have one tensor per parameter");
  check(static_cast<int64_t>(geometry.size()) == kGeometry * T, "geometry must have 6 numbers per parameter");
  check_dense(hyper, "hyper", ScalarType::Double, kHyper * T);
  check_dense(found_inf, "found_inf", ScalarType::Float, 1);
  if (seeds) check_dense(*seeds, "seeds", ScalarType::Long, T);
  check(0 <= first && first <= last && last <= 3, "first and last must be phases, 0 to 3");

  std::vector<int64_t> small, large;
  std::vector<Came8bit> all;
  all.reserve(params.size());
  int64_t partial_size = 0, items = 0;
  for (int64_t i = 0; i < T; ++i) {
    all.push_back(parameter(params[i], grads[i], exp_avg[i], scales[i], second[i], col[i], res_row[i], res_col[i],
                            work[i], data<double>(hyper) + kHyper * i, geometry.data() + kGeometry * i));
    Came8bit& a = all.back();
    if (seeds && data<int64_t>(*seeds)[i] >= 0 && a.p.dtype == Dtype::kBFloat16)
      a.by_chance = true, a.seed = static_cast<uint32_t>(data<int64_t>(*seeds)[i]);
    const int64_t n = a.B * a.R * a.C;
    (n <= kSmall ? small : large).push_back(i);
    items += a.B * a.chunks;
    if (a.chunks > 1 && a.factored) partial_size = std::max(partial_size, a.B * a.chunks * a.C);
  }
  // A small parameter of several chunks has a partial sum of its own: its task runs beside others.
  int64_t small_size = 0;
  for (const int64_t i : small)
    small_size += all[i].chunks > 1 && all[i].factored ? all[i].B * all[i].chunks * all[i].C : 0;
  Tensor space = empty(found_inf, {partial_size + small_size}, ScalarType::Float);
  std::vector<float*> partials(params.size(), data<float>(space));
  float* next = data<float>(space) + partial_size;
  for (const int64_t i : small) {
    partials[i] = next;
    next += all[i].chunks > 1 && all[i].factored ? all[i].B * all[i].chunks * all[i].C : 0;
  }
  std::vector<double> sums(static_cast<size_t>(items));
  std::vector<int> not_finite(params.size());
  double* next_sum = sums.data();
  for (int64_t i = 0; i < T; ++i) {
    all[i].sums = next_sum, all[i].not_finite = &not_finite[i];
    next_sum += all[i].B * all[i].chunks;
  }

  const auto run_phases = [&](int64_t from, int64_t to) {
    for (const int64_t i : large)
      for (int64_t phase = from; phase <= to; ++phase)
        run_phase(all[i], phase, partials[i],
                  [](Kernel kernel, const Came8bit& a, int64_t n) { parallel(kernel, a, n, 1); });
    if (small.empty()) return;
    int64_t elements = 0;
    for (const int64_t i : small) elements += all[i].B * all[i].R * all[i].C;
    const int64_t count = static_cast<int64_t>(small.size());
    torch::stable::parallel_for(0, count, std::max<int64_t>(1, kGrainElements * count / std::max<int64_t>(1, elements)),
                                [&](int64_t begin, int64_t end) {
                                  for (int64_t n = begin; n < end; ++n)
                                    for (int64_t phase = from; phase <= to; ++phase)
                                      run_phase(all[small[n]], phase, partials[small[n]],
                                                [](Kernel kernel, const Came8bit& a, int64_t m) { kernel(a, 0, m); });
                                });
  };
  // All gradients are looked at before any state changes.
  float* found = data<float>(found_inf);
  if (first == 0) {
    run_phases(0, 0);
    *found += static_cast<float>(std::count(not_finite.begin(), not_finite.end(), 1));
  }
  if (last >= 1 && *found == 0.0f) run_phases(std::max<int64_t>(first, 1), last);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, CPU, m) { m.impl("came8bit_step", TORCH_BOX(&came8bit_step_cpu)); }

}  // namespace sana_ext::cpu
