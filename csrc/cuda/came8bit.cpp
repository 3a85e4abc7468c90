// CUDA glue of came8bit.
#include "kernels/came8bit.h"

#include <vector>

#include "glue.h"

namespace sana_ext::cuda {
namespace {

using Tensors = std::vector<Tensor>;

constexpr int64_t kGeometry = 6;  // numbers per parameter: matrices, rows, cols, factored, block, linear

const void* dense(Launch& launch, const Tensor& t, const char* name, ScalarType dtype, int64_t elements,
                  bool writable) {
  check(t.scalar_type() == dtype && t.numel() == elements && t.is_contiguous(), name, " must be contiguous, of ",
        elements, " elements and of the dtype the schema names");
  return writable ? launch.out_raw(t, name) : launch.in_raw(t, name);
}
template <class T>
T* state(Launch& launch, const Tensor& t, const char* name, ScalarType dtype, int64_t elements) {
  return static_cast<T*>(const_cast<void*>(dense(launch, t, name, dtype, elements, true)));
}

bool is_bf16(const Tensor& t, const char* name) {
  const bool bf16 = t.scalar_type() == ScalarType::BFloat16;
  check(bf16 || t.scalar_type() == ScalarType::Float, name, " must be float32 or bfloat16");
  return bf16;
}

// Memory of one call, counted first and given out then; every part begins at a multiple of 16 bytes.
class Space {
 public:
  template <class T>
  int64_t add(int64_t count) {
    const int64_t begin = bytes_;
    bytes_ += (count * static_cast<int64_t>(sizeof(T)) + 15) / 16 * 16;
    return begin;
  }
  void allocate(Launch& launch, const Tensor& like) {
    tensor_ = empty(like, {bytes_ / 8 + 1}, ScalarType::Double);
    data_ = static_cast<char*>(launch.out_raw(*tensor_, "workspace"));
  }
  template <class T>
  T* at(int64_t begin) const {
    return reinterpret_cast<T*>(data_ + begin);
  }

 private:
  int64_t bytes_ = 0;
  OptionalTensor tensor_;
  char* data_ = nullptr;
};

void came8bit_step_cuda(Tensors params, Tensors grads, Tensors exp_avg, Tensors scales, Tensors second, Tensors col,
                        Tensors res_row, Tensors res_col, Tensors work, const Tensor& hyper,
                        const OptionalTensor& seeds, const Tensor& found_inf, std::vector<int64_t> geometry,
                        int64_t first, int64_t last) {
  const auto count = static_cast<int64_t>(params.size());
  for (const Tensors* list : {&grads, &exp_avg, &scales, &second, &col, &res_row, &res_col, &work})
    check(static_cast<int64_t>(list->size()) == count, "every list must have one tensor per parameter");
  check(static_cast<int64_t>(geometry.size()) == kGeometry * count, "geometry must have 6 numbers per parameter");
  check(0 <= first && first <= last && last <= 3, "first and last must be phases, 0 to 3");
  if (count == 0) return;
  constexpr ScalarType kFloat = ScalarType::Float;
  Launch launch(found_inf);
  Came8bitLaunch a{};
  a.count = static_cast<int32_t>(count);
  a.found_inf = state<float>(launch, found_inf, "found_inf", kFloat, 1);
  a.hyper =
      static_cast<const double*>(dense(launch, hyper, "hyper", ScalarType::Double, kCame8bitHyper * count, false));
  if (seeds) a.seeds = static_cast<const int64_t*>(dense(launch, *seeds, "seeds", ScalarType::Long, count, false));

  std::vector<Came8bitTensor> table(params.size());
  std::vector<int64_t> places(params.size());
  Space space;
  int64_t tiles = 0, items = 0;
  for (size_t i = 0; i < params.size(); ++i) {
    Came8bitTensor& t = table[i];
    const int64_t* sizes = geometry.data() + kGeometry * static_cast<int64_t>(i);
    const int64_t B = sizes[0], R = sizes[1], C = sizes[2], block = sizes[4], n = B * R * C;
    const bool factored = sizes[3] != 0;
    t.linear = sizes[5] != 0;
    check(B >= 0 && R >= 0 && C >= 0 && block >= 1 && block < int64_t{1} << 30, "geometry must not be negative");
    check(factored || B == 1, "geometry: a parameter that is not factored is one matrix");
    t.p_bf16 = is_bf16(params[i], "params"), t.g_bf16 = is_bf16(grads[i], "grads");
    t.p = state<void>(launch, params[i], "params", params[i].scalar_type(), n);
    t.g = dense(launch, grads[i], "grads", grads[i].scalar_type(), n, false);
    const bool bytes = exp_avg[i].scalar_type() == ScalarType::Byte;
    if (bytes)
      t.codes = state<uint8_t>(launch, exp_avg[i], "exp_avg", ScalarType::Byte, n);
    else
      t.m = state<float>(launch, exp_avg[i], "exp_avg", kFloat, n);
    t.second = state<float>(launch, second[i], "second", kFloat, factored ? B * R : n);
    came8bit_layout(t, B, R, C, factored, block);
    if (bytes)
      t.scales = state<float>(launch, scales[i], "scales", kFloat, B * t.units * t.blocks * (t.linear ? 2 : 1));
    if (factored) {
      t.col = state<float>(launch, col[i], "col", kFloat, B * C);
      t.res_row = state<float>(launch, res_row[i], "res_row", kFloat, B * R);
      t.res_col = state<float>(launch, res_col[i], "res_col", kFloat, B * C);
    }
    came8bit_place_work(t, state<float>(launch, work[i], "work", kFloat, came8bit_work(t)));
    places[i] = space.add<float>(came8bit_space(t));
    t.first_tile = static_cast<uint32_t>(tiles), t.first_item = static_cast<uint32_t>(items);
    tiles += t.tiles, items += t.items;
    check(tiles < int64_t{1} << 31 && items < int64_t{1} << 31, "too many values in one call");
  }
  a.tiles = static_cast<uint32_t>(tiles), a.items = static_cast<uint32_t>(items);
  const int64_t tensors = space.add<Came8bitTensor>(count), tile_owner = space.add<int32_t>(tiles);
  const int64_t item_owner = space.add<int32_t>(items), tile_sums = space.add<float>(tiles);
  const int64_t item_sums = space.add<double>(2 * items), flags = space.add<int32_t>(count);
  space.allocate(launch, found_inf);
  a.tensors = space.at<Came8bitTensor>(tensors), a.tile_owner = space.at<int32_t>(tile_owner);
  a.item_owner = space.at<int32_t>(item_owner), a.tile_sums = space.at<float>(tile_sums);
  a.item_sums = space.at<double>(item_sums), a.flags = space.at<int32_t>(flags);
  for (size_t i = 0; i < params.size(); ++i) came8bit_place(table[i], space.at<float>(places[i]));

  for (int64_t begin = 0; begin < count; begin += kCame8bitTensors) {
    Came8bitTable part{};
    part.launch = a, part.first = static_cast<int32_t>(begin);
    for (int64_t i = begin; i < count && i < begin + kCame8bitTensors; ++i)
      part.tensors[part.count++] = table[static_cast<size_t>(i)];
    Launch::succeeded(came8bit_table(part, launch.stream()), "came8bit_step");
  }
  Launch::succeeded(came8bit_phases(a, static_cast<int>(first), static_cast<int>(last), launch.stream()),
                    "came8bit_step");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(sana_ext, SANA_EXT_DEVICE, m) { m.impl("came8bit_step", TORCH_BOX(&came8bit_step_cuda)); }

}  // namespace sana_ext::cuda
