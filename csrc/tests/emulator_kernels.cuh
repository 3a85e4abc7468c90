// Kernels that use every primitive, each also with mistakes to plant: the emulator must find them.
#pragma once
#include "../cuda/kernels/primitives.cuh"

// Machine code, checked by `make kernels`: gemm_kernel<*>: HMMA LDSM LDGSTS.128

namespace sana_ext::cuda {

enum class Plant {
  kNothing,
  kMissingBarrier,
  kMissingWait,
  kOffByOneIndex,
  kGlobalOutOfBounds,
  kSharedOutOfBounds,
  kDivergentBarrier,
  kEarlyExit,
  kMissingLane,
  kUninitialised,
  kMisaligned,
  kWritesInput,
  kSharedOutput,
};

struct SumArgs {
  int64_t n, per_block;
  const float* x;  // [n]
  float* sums;     // [blocks]
};

// sums[block] = sum of its per_block elements of x. 128 threads.
template <Plant kPlant>
__global__ void __launch_bounds__(128) sum_kernel(SumArgs a) {
  constexpr int kWarps = 4;
  SharedMemory memory;
  const Shared<float> slots = memory.take<float>(kWarps);
  const int64_t first = blockIdx.x * a.per_block;
  const int64_t last = kPlant != Plant::kGlobalOutOfBounds && first + a.per_block > a.n ? a.n : first + a.per_block;
  if (kPlant == Plant::kEarlyExit && first + threadIdx.x >= last) return;
  float sum = 0.0f;
  for (int64_t i = first + threadIdx.x; i < last; i += 128) sum += load_global(a.x + i);
  if (kPlant == Plant::kMissingLane) {
    if (threadIdx.x % kWarpSize != 5) sum = warp_sum(sum);
  } else {
    sum = warp_sum(sum);
  }
  const int lane = threadIdx.x % kWarpSize, warp = threadIdx.x / kWarpSize;
  if (lane == 0 && !(kPlant == Plant::kUninitialised && warp == 2)) slots[warp] = sum;
  if (kPlant == Plant::kDivergentBarrier) {
    if (warp == 1)
      __syncthreads();
    else
      __syncthreads();
  } else if (kPlant != Plant::kMissingBarrier) {
    __syncthreads();
  }
  if (threadIdx.x != 0) return;
  float total = 0.0f;
  for (int i = 0; i < kWarps + (kPlant == Plant::kSharedOutOfBounds); ++i) total += slots[i];
  store_global(kPlant == Plant::kWritesInput ? const_cast<float*>(a.x)
                                             : a.sums + (kPlant == Plant::kSharedOutput ? 0 : blockIdx.x),
               total);
}

struct TransposeArgs {
  int rows, columns;
  const float* x;  // [rows, columns]
  float* y;        // [columns, rows]
};

constexpr int kTransposeTile = 32;

// y = x^T in tiles of 32x32 through shared memory. 32x8 threads.
template <Plant kPlant>
__global__ void __launch_bounds__(256) transpose_kernel(TransposeArgs a) {
  constexpr int kTile = kTransposeTile, kPitch = kTile + 1;  // one more: a column has 32 banks
  SharedMemory memory;
  const Shared<float> tile = memory.take<float>(kTile * kPitch);
  const int x = threadIdx.x, column = blockIdx.x * kTile, row = blockIdx.y * kTile;
  for (int y = threadIdx.y; y < kTile; y += 8)
    if (row + y < a.rows && column + x < a.columns)
      tile[y * kPitch + x] = load_global(a.x + static_cast<int64_t>(row + y) * a.columns + column + x);
  if (kPlant != Plant::kMissingBarrier) __syncthreads();
  for (int y = threadIdx.y; y < kTile; y += 8) {
    const int from = x * kPitch + y + (kPlant == Plant::kOffByOneIndex);
    const bool inside = column + y < a.columns && (row + x < a.rows || kPlant == Plant::kUninitialised);
    if (inside) store_global(a.y + static_cast<int64_t>(column + y) * a.rows + row + x, static_cast<float>(tile[from]));
  }
}

template <class T>
struct GemmArgs {
  int M, N, K;  // N and K are multiples of 8
  const T* a;   // [M, K]
  const T* b;   // [K, N]
  float* c;     // [M, N]
};

constexpr int kGemmTile = 32, kGemmStages = 3;
constexpr int kGemmPitchA = 16 + 8, kGemmPitchB = kGemmTile + 8;  // rows 8 elements longer: no bank conflicts
template <class T>
constexpr size_t kGemmShared =
    shared_size<T>(kGemmStages * kGemmTile * kGemmPitchA) + shared_size<T>(kGemmStages * 16 * kGemmPitchB);

// c = a b in tiles of 32x32, 16 of K at a time in a pipeline of 3 stages. 4 warps, each 16x16 of the tile.
template <class T, Plant kPlant>
__global__ void __launch_bounds__(128) gemm_kernel(GemmArgs<T> g) {
  SharedMemory memory;
  const Shared<T> a_stages = memory.take<T>(kGemmStages * kGemmTile * kGemmPitchA);
  const Shared<T> b_stages = memory.take<T>(kGemmStages * 16 * kGemmPitchB);
  const int row = blockIdx.y * kGemmTile, column = blockIdx.x * kGemmTile;
  const int steps = (g.K + 15) / 16, thread = threadIdx.x;
  const int warp = thread / kWarpSize, lane = thread % kWarpSize;

  const auto fetch = [&](int step) {
    const int stage = step % kGemmStages;
    if (thread < 64) {  // 32 rows of a, two pieces of 8 each
      const int m = thread / 2, k = thread % 2 * 8;
      const bool valid = step < steps && row + m < g.M && step * 16 + k < g.K;
      const int64_t from = static_cast<int64_t>(row + m) * g.K + step * 16 + k;
      copy_async16(a_stages + (stage * kGemmTile + m) * kGemmPitchA + k,
                   g.a + (valid || kPlant == Plant::kGlobalOutOfBounds ? from : 0) + (kPlant == Plant::kMisaligned),
                   valid || kPlant == Plant::kGlobalOutOfBounds);
    } else {  // 16 rows of b, four pieces each
      const int k = (thread - 64) / 4, n = thread % 4 * 8;
      const bool valid = step < steps && step * 16 + k < g.K && column + n < g.N;
      copy_async16(b_stages + (stage * 16 + k) * kGemmPitchB + n,
                   g.b + (valid ? static_cast<int64_t>(step * 16 + k) * g.N + column + n : 0), valid);
    }
    copy_async_commit();
  };

  float sum[2][4] = {};
  for (int step = 0; step < kGemmStages - 1; ++step) fetch(step);
  for (int step = 0; step < steps; ++step) {
    if (kPlant == Plant::kMissingWait)
      copy_async_wait<kGemmStages - 1>();  // one group too many may still be in flight
    else
      copy_async_wait<kGemmStages - 2>();
    if (kPlant != Plant::kMissingBarrier) __syncthreads();  // this stage has arrived, the one before it is free
    fetch(step + kGemmStages - 1);
    const int stage = step % kGemmStages, m = warp / 2 * 16, n = warp % 2 * 16;
    uint32_t a[4], b[4];
    load_matrix(a, a_stages + (stage * kGemmTile + m + lane % 16) * kGemmPitchA + lane / 16 * 8);
    load_matrix_transposed(b, b_stages + (stage * 16 + lane % 16) * kGemmPitchB + n + lane / 16 * 8);
    for (int half = 0; half < 2; ++half) {
      const uint32_t b_half[2] = {b[2 * half], b[2 * half + 1]};
      mma_16x8x16<T>(sum[half], a, b_half);
    }
  }
  copy_async_wait<0>();
  for (int half = 0; half < 2; ++half) {
    for (int i = 0; i < 4; ++i) {
      const int m = row + warp / 2 * 16 + lane / 4 + i / 2 * 8;
      const int n = column + warp % 2 * 16 + half * 8 + lane % 4 * 2 + i % 2;
      if (m < g.M && n < g.N) store_global(g.c + static_cast<int64_t>(m) * g.N + n, sum[half][i]);
    }
  }
}

struct WarpArgs {
  const uint32_t* matrix;  // [32, 4]: 32 rows of 8 16-bit elements
  uint32_t* out;           // [32, kWarpResults]
};

constexpr int kWarpResults = 31;

// Everything that lanes can tell each other. One block of 64 threads; the second warp goes through a named barrier.
template <Plant kPlant>
__global__ void __launch_bounds__(64) warp_kernel(WarpArgs a) {
  SharedMemory memory;
  const Shared<Half> rows = memory.take<Half>(32 * 8);
  const Shared<uint32_t> relay = memory.take<uint32_t>(32);
  const unsigned lane = threadIdx.x % kWarpSize;
  if (threadIdx.x >= kWarpSize) {
    relay[lane] = lane * lane;
    if (kPlant != Plant::kMissingBarrier) named_barrier(3, 64);
    return;
  }
  store_shared16(rows + lane * 8, load_global(reinterpret_cast<const Bytes16*>(a.matrix) + lane));
  if (kPlant != Plant::kMissingWait) __syncwarp();
  uint32_t r[kWarpResults];
  int k = 0;
  r[k++] = __shfl_xor_sync(kAllLanes, lane, 5);
  r[k++] = __shfl_up_sync(kAllLanes, lane, 3);
  r[k++] = __shfl_down_sync(kAllLanes, lane, 3, 8);
  r[k++] = __shfl_sync(kAllLanes, lane, 9);
  r[k++] = __ballot_sync(kAllLanes, lane % 3 == 0);
  r[k++] = __any_sync(kAllLanes, lane == 31);
  r[k++] = __all_sync(kAllLanes, lane < 31);
  r[k++] = __reduce_add_sync(kAllLanes, lane);
  // Two halves of the warp apart from each other.
  const unsigned half = lane < 16 ? 0xffffu : 0xffff0000u;
  r[k++] = lane < 16 ? __reduce_add_sync(half, lane) : __reduce_add_sync(half, 1u);
  uint32_t one[1], two[2], four[4];
  load_matrix(one, rows + lane % 8 * 8);
  load_matrix(two, rows + lane % 16 * 8);
  load_matrix(four, rows + lane * 8);
  r[k++] = one[0], r[k++] = two[0], r[k++] = two[1];
  for (int i = 0; i < 4; ++i) r[k++] = four[i];
  load_matrix_transposed(one, rows + lane % 8 * 8);
  load_matrix_transposed(two, rows + lane % 16 * 8);
  load_matrix_transposed(four, rows + lane * 8);
  r[k++] = one[0], r[k++] = two[0], r[k++] = two[1];
  for (int i = 0; i < 4; ++i) r[k++] = four[i];
  if (kPlant != Plant::kMissingBarrier) named_barrier(3, 64);
  r[k++] = relay[31 - lane];
  r[k++] = blockDim.x * gridDim.x;
  r[k++] = load_shared4(rows + lane * 8 + 2);
  const float x = static_cast<float>(lane) - 15.5f;
  r[k++] = float_bits(tanh_approx(x)), r[k++] = float_bits(exp2_approx(x)), r[k++] = float_bits(reciprocal_approx(x));
  const float whole = static_cast<float>(lane) - 4.0f, not_a_number = bits_float(0x7fc00000u);
  r[k++] = relu2<BFloat16>(pack<BFloat16>(whole, -whole));
  r[k++] = relu2<Half>(pack<Half>(not_a_number, whole));
  for (int i = 0; i < kWarpResults; ++i) store_global(a.out + lane * kWarpResults + i, r[i]);
}

}  // namespace sana_ext::cuda
