// The table of parameters, and what lies between the passes over the tiles; see came8bit.h.
#include "came8bit.h"

#include <initializer_list>

#include "../../common/code8.h"
#include "came8bit_tile.cuh"

namespace sana_ext::cuda {
namespace {

constexpr int kThreads = kCame8bitThreads, kWarps = kThreads / kWarpSize;

// As block_sum, in double. `slots` may be used again after the next barrier.
__device__ inline double total_of(double value, Shared<double> slots) {
#pragma unroll
  for (int offset = kWarpSize / 2; offset > 0; offset /= 2) value += __shfl_xor_sync(kAllLanes, value, offset);
  if (threadIdx.x % kWarpSize == 0) slots[threadIdx.x / kWarpSize] = value;
  __syncthreads();
  double total = 0.0;
#pragma unroll
  for (int warp = 0; warp < kWarps; ++warp) total += slots[warp];
  return total;
}

__device__ inline float average(float old, float value, double beta) {
  return old * static_cast<float>(beta) + value * static_cast<float>(1 - beta);
}

// 256 rows, or columns, of one matrix.
struct Item {
  int64_t b;
  bool rows;
  int64_t at;  // this thread's row or column of all matrices; -1: none
};

__device__ inline Item item_of(const Came8bitTensor& t) {
  const auto number = static_cast<int32_t>(blockIdx.x - t.first_item), each = t.row_items + t.col_items;
  const int32_t within = number % each;
  Item item;
  item.b = number / each, item.rows = within < t.row_items;
  const int64_t size = item.rows ? t.R : t.C;
  const int64_t i = static_cast<int64_t>(item.rows ? within : within - t.row_items) * kThreads + threadIdx.x;
  item.at = i < size ? item.b * size + i : -1;
  return item;
}

__global__ void __launch_bounds__(kThreads) came8bit_table_kernel(Came8bitTable a) {
  const int number = static_cast<int>(blockIdx.x), owner = a.first + number;
  const uint32_t first_tile = a.tensors[number].first_tile, first_item = a.tensors[number].first_item;
  const int32_t tiles = a.tensors[number].tiles, items = a.tensors[number].items;
  if (threadIdx.x == 0) a.launch.tensors[owner] = a.tensors[number];
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < tiles; i += kThreads)
    store_global(a.launch.tile_owner + first_tile + i, owner);
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < items; i += kThreads)
    store_global(a.launch.item_owner + first_item + i, owner);
}

// After phases 0 and 2: the sums of the tiles in their order, means of rows, and sums over each 256 rows.
__global__ void __launch_bounds__(kThreads) came8bit_after_kernel(Came8bitLaunch a) {
  SharedMemory memory;
  const Shared<double> slots = memory.take<double>(kWarps), others = memory.take<double>(kWarps);
  if (a.phase != 0 && load_global(a.found_inf) != 0.0f) return;
  const int owner = load_global(a.item_owner + blockIdx.x);
  const Came8bitTensor t = tensor_of(a, owner);
  if (!t.factored) return;
  const Item item = item_of(t);
  if (!item.rows) {
    if (item.at < 0) return;
    const float* part = t.col_part + item.b * t.chunks * t.C + (item.at - item.b * t.C);
    float sum = 0.0f;
#pragma unroll 8
    for (int32_t chunk = 0; chunk < t.chunks; ++chunk) sum += load_global(part + chunk * t.C);
    return store_global((a.phase == 0 ? t.w_col : t.w_res_col) + item.at, sum);
  }
  double next = 0.0, mean = 0.0;
  if (item.at >= 0) {
    float sum = 0.0f;
#pragma unroll 4
    for (int32_t strip = 0; strip < t.strips; ++strip) sum += load_global(t.row_part + strip * t.B * t.R + item.at);
    sum /= static_cast<float>(t.C);
    store_global((a.phase == 0 ? t.w_row : t.w_res_row) + item.at, sum);
    const double beta = hyper64(a, owner, a.phase == 0 ? 3 : 4), eps = hyper64(a, owner, a.phase == 0 ? 5 : 6);
    const float old = load_global((a.phase == 0 ? t.second : t.res_row) + item.at);
    mean = sum, next = average(old, sum + static_cast<float>(eps), beta);
  }
  const double nexts = total_of(next, slots), means = total_of(mean, others);
  if (threadIdx.x == 0)
    store_global(a.item_sums + 2 * blockIdx.x, nexts), store_global(a.item_sums + 2 * blockIdx.x + 1, means);
}

// After phases 0 to 2, a block per parameter: sums over it, and whether its squares are finite.
__global__ void __launch_bounds__(kThreads) came8bit_totals_kernel(Came8bitLaunch a) {
  SharedMemory memory;
  const Shared<double> slots = memory.take<double>(2 * kWarps);
  if (a.phase != 0 && load_global(a.found_inf) != 0.0f) return;
  const Came8bitTensor t = tensor_of(a, blockIdx.x);
  double all = 0.0;
  if (a.phase == 1 || (a.phase == 0 && !t.factored)) {
    for (int32_t i = static_cast<int32_t>(threadIdx.x); i < t.tiles; i += kThreads)
      all += load_global(a.tile_sums + t.first_tile + i);
    all = total_of(all, slots);
    if (a.phase == 1 && threadIdx.x == 0) store_global(t.w_square, static_cast<float>(all));
  } else if (t.factored) {
    // A warp per matrix.
    const int64_t each = t.row_items + t.col_items;
    for (int64_t b = threadIdx.x / kWarpSize; b < t.B; b += kWarps) {
      double next = 0.0, mean = 0.0;
      for (int32_t i = static_cast<int32_t>(threadIdx.x) % kWarpSize; i < t.row_items; i += kWarpSize) {
        const double* sums = a.item_sums + 2 * (t.first_item + b * each + i);
        next += load_global(sums), mean += load_global(sums + 1);
      }
#pragma unroll
      for (int offset = kWarpSize / 2; offset > 0; offset /= 2)
        next += __shfl_xor_sync(kAllLanes, next, offset), mean += __shfl_xor_sync(kAllLanes, mean, offset);
      if (threadIdx.x % kWarpSize == 0) {
        store_global((a.phase == 0 ? t.w_total : t.w_res_total) + b, static_cast<float>(next));
        all += mean * static_cast<double>(t.C);
      }
    }
    all = total_of(all, slots + kWarps);
  }
  if (a.phase == 0 && threadIdx.x == 0) store_global(a.flags + blockIdx.x, all <= 3.4028235e38 ? 0 : 1);  // NaN: 1
}

__global__ void __launch_bounds__(kThreads) came8bit_found_kernel(Came8bitLaunch a) {
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kWarps);
  float found = 0.0f;
  for (int32_t i = static_cast<int32_t>(threadIdx.x); i < a.count; i += kThreads)
    found += load_global(a.flags + i) != 0 ? 1.0f : 0.0f;
  const float total = block_sum<kWarps>(found, slots);
  if (threadIdx.x == 0 && total != 0.0f) store_global(a.found_inf, load_global(a.found_inf) + total);
}

// Before phases 1 and 3: new averages of rows and columns, and in w the factors that come of them; before 3 also the
// scales of the new moments.
__global__ void __launch_bounds__(kThreads) came8bit_before_kernel(Came8bitLaunch a) {
  if (load_global(a.found_inf) != 0.0f) return;
  const int owner = load_global(a.item_owner + blockIdx.x);
  const Came8bitTensor t = tensor_of(a, owner);
  const Item item = item_of(t);
  if (item.at < 0) return;
  const bool one = a.phase == 1;
  const double beta = hyper64(a, owner, one ? 3 : 4), rows = hyper64(a, owner, 12);
  const auto eps = static_cast<float>(hyper64(a, owner, one ? 5 : 6));
  if (!item.rows) {
    float* col = (one ? t.col : t.res_col) + item.at;
    float* w = (one ? t.w_col : t.w_res_col) + item.at;
    const float next = average(load_global(col), load_global(w) / static_cast<float>(rows) + eps, beta);
    store_global(col, next);
    store_global(w, 1.0f / sqrtf(next * static_cast<float>(hyper64(a, owner, one ? 10 : 11))));
    return;
  }
  if (t.factored) {
    float* row = (one ? t.second : t.res_row) + item.at;
    float* w = (one ? t.w_row : t.w_res_row) + item.at;
    const auto mean = static_cast<float>(load_global((one ? t.w_total : t.w_res_total) + item.b) / rows);
    const float next = average(load_global(row), load_global(w) + eps, beta);
    store_global(row, next);
    store_global(w, 1.0f / sqrtf(next / mean));
  }
  const int64_t first = item.at - item.b * t.R;
  if (one || t.codes == nullptr || first % t.unit_rows != 0) return;
  const int64_t last = first + t.unit_rows < t.R ? first + t.unit_rows : t.R;
  for (int32_t block = 0; block < t.blocks; ++block) {
    float low = kCodeLargest, high = -kCodeLargest;
    for (int64_t r = first; r < last; ++r) {
#pragma unroll 4
      for (int32_t strip = block * t.block_strips; strip < (block + 1) * t.block_strips; ++strip) {
        const int64_t at = (strip * t.B + item.b) * t.R + r;
        const float l = load_global(t.low + at), h = load_global(t.high + at);
        low = l < low ? l : low, high = h > high ? h : high;
      }
    }
    float* fresh = t.fresh + 2 * ((item.b * t.units + first / t.unit_rows) * t.blocks + block);
    const float step = t.linear ? linear_step(low, high) : 0.0f;
    store_global(fresh, t.linear ? linear_low(low, high, step) : code_scale(high > -low ? high : -low));
    store_global(fresh + 1, step);
  }
}

// After phase 3: the scales that its codes are of.
__global__ void __launch_bounds__(kThreads) came8bit_commit_kernel(Came8bitLaunch a) {
  if (load_global(a.found_inf) != 0.0f) return;
  const Came8bitTensor t = tensor_of(a, load_global(a.item_owner + blockIdx.x));
  const Item item = item_of(t);
  if (item.at < 0 || !item.rows || t.codes == nullptr) return;
  const int64_t row = item.at - item.b * t.R;
  if (row % t.unit_rows != 0) return;
  const int64_t first = (item.b * t.units + row / t.unit_rows) * t.blocks;
  for (int64_t i = first; i < first + t.blocks; ++i) {
    const float low = load_global(t.fresh + 2 * i);
    if (t.linear)
      store_global(t.scales + 2 * i, low), store_global(t.scales + 2 * i + 1, load_global(t.fresh + 2 * i + 1));
    else
      store_global(t.scales + i, low);
  }
}

int64_t quotient(int64_t n, int64_t d) { return (n + d - 1) / d; }

}  // namespace

void came8bit_layout(Came8bitTensor& t, int64_t B, int64_t R, int64_t C, bool factored, int64_t block) {
  constexpr int64_t kLeastBlock = 64;  // rows of fewer values share a block
  t.n = B * R * C, t.factored = factored;
  const int64_t least = block < kLeastBlock ? block : kLeastBlock;
  int64_t unit_rows = 1;
  while (C > 0 && unit_rows * C < least && unit_rows < R) unit_rows *= 2;
  unit_rows = unit_rows < R || R == 0 ? unit_rows : R;
  const int64_t pieces = C / block > 1 ? C / block : 1;
  int64_t length = quotient(C, pieces);
  if (t.codes == nullptr) length = factored ? C : kCame8bitStrip, unit_rows = 1;
  if (!factored && (t.codes == nullptr || unit_rows > 1)) {
    C = t.codes == nullptr ? kCame8bitStrip : unit_rows * C;
    length = C, unit_rows = 1, R = quotient(t.n, C > 0 ? C : 1);
  }
  length = length > 0 ? length : 1;
  t.B = B, t.R = R, t.C = C;
  t.unit_rows = static_cast<int32_t>(unit_rows), t.units = quotient(R, unit_rows);
  t.block = static_cast<int32_t>(length), t.blocks = static_cast<int32_t>(C > 0 ? quotient(C, length) : 1);
  t.block_strips = static_cast<int32_t>(quotient(length, kCame8bitStrip));
  const int64_t even = quotient(quotient(length, t.block_strips), 8) * 8;  // strips of one block as equal as can be
  t.strip_width = static_cast<int32_t>(even < kCame8bitStrip ? even : kCame8bitStrip);
  t.strips = t.blocks * t.block_strips;
  t.chunks = static_cast<int32_t>(quotient(R, kCame8bitRows));
  t.tiles = t.n > 0 ? static_cast<int32_t>(B * t.chunks * t.strips) : 0;
  t.row_items = factored || t.codes != nullptr ? static_cast<int32_t>(quotient(R, kCame8bitThreads)) : 0;
  t.col_items = factored ? static_cast<int32_t>(quotient(C, kCame8bitThreads)) : 0;
  t.items = static_cast<int32_t>(B * (t.row_items + t.col_items));
  t.aligned = C % 8 == 0 && (t.blocks == 1 || t.block % 8 == 0);
  for (const void* data : {static_cast<const void*>(t.p), t.g, static_cast<const void*>(t.codes),
                           static_cast<const void*>(t.m), static_cast<const void*>(factored ? nullptr : t.second)})
    t.aligned = t.aligned && reinterpret_cast<uintptr_t>(data) % 16 == 0;
}

int64_t came8bit_space(const Came8bitTensor& t) {
  const int64_t rows = t.strips * t.B * t.R;
  return (t.factored ? rows + t.B * t.chunks * t.C : 0) +
         (t.codes != nullptr ? 2 * rows + 2 * t.B * t.units * t.blocks : 0);
}

void came8bit_place(Came8bitTensor& t, float* space) {
  const int64_t rows = t.strips * t.B * t.R;
  if (t.factored) {
    t.row_part = space, t.col_part = t.row_part + rows;
    space = t.col_part + t.B * t.chunks * t.C;
  }
  if (t.codes != nullptr) t.low = space, t.high = t.low + rows, t.fresh = t.high + rows;
}

int64_t came8bit_work(const Came8bitTensor& t) { return 1 + (t.factored ? 2 * t.B * (1 + t.C + t.R) : 0); }

void came8bit_place_work(Came8bitTensor& t, float* work) {
  const int64_t B = t.factored ? t.B : 0;
  t.w_total = work, t.w_col = t.w_total + B, t.w_square = t.w_col + B * t.C;
  t.w_res_total = t.w_square + 1, t.w_res_col = t.w_res_total + B;
  t.w_row = t.w_res_col + B * t.C, t.w_res_row = t.w_row + B * t.R;
}

cudaError_t came8bit_table(const Came8bitTable& a, cudaStream_t stream) {
  if (a.count == 0) return cudaSuccess;
  return SANA_EXT_LAUNCH(came8bit_table_kernel, static_cast<unsigned>(a.count), kThreads, size_t{0}, stream, a);
}

cudaError_t came8bit_phases(Came8bitLaunch a, int first, int last, cudaStream_t stream) {
  constexpr size_t kSums = 2 * shared_size<double>(kWarps);
  const auto count = static_cast<unsigned>(a.count);
  cudaError_t error = cudaSuccess;
  const auto run = [&](auto launch) {
    if (error == cudaSuccess) error = launch();
  };
  const auto pass = [&](int phase) {
    a.phase = phase;
    run([&] { return came8bit_pass(a, stream); });
  };
  for (int phase = first; phase <= last; ++phase) {
    if (phase == 3 && first == 3) pass(2);  // for the least and largest moments
    a.phase = phase;
    if (phase % 2 == 1 && a.items > 0)
      run([&] { return SANA_EXT_LAUNCH(came8bit_before_kernel, a.items, kThreads, size_t{0}, stream, a); });
    pass(phase);
    if (phase % 2 == 0 && a.items > 0)
      run([&] { return SANA_EXT_LAUNCH(came8bit_after_kernel, a.items, kThreads, kSums, stream, a); });
    if (phase < 3 && count > 0)
      run([&] { return SANA_EXT_LAUNCH(came8bit_totals_kernel, count, kThreads, kSums, stream, a); });
    if (phase == 0) {
      const size_t slots = shared_size<float>(kWarps);
      run([&] { return SANA_EXT_LAUNCH(came8bit_found_kernel, 1u, kThreads, slots, stream, a); });
    }
    if (phase == 3 && a.items > 0)
      run([&] { return SANA_EXT_LAUNCH(came8bit_commit_kernel, a.items, kThreads, size_t{0}, stream, a); });
  }
  return error;
}

}  // namespace sana_ext::cuda
