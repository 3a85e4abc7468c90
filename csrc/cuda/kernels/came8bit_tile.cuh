// Where a thread of CAME8bit's passes works, and what it reads of the launch; see came8bit.h.
#pragma once
#include "came8bit.h"
#include "lane_values.cuh"

namespace sana_ext::cuda {

// A copy of the launch's i-th tensor.
__device__ inline Came8bitTensor tensor_of(const Came8bitLaunch& a, int64_t i) {
  Came8bitTensor t = a.tensors[i];
  t.p = to_global(t.p), t.g = to_global(t.g), t.codes = to_global(t.codes), t.scales = to_global(t.scales);
  for (float** pointer :
       {&t.m, &t.second, &t.col, &t.res_row, &t.res_col, &t.w_total, &t.w_col, &t.w_square, &t.w_res_total,
        &t.w_res_col, &t.w_row, &t.w_res_row, &t.row_part, &t.col_part, &t.low, &t.high, &t.fresh})
    *pointer = to_global(*pointer);
  return t;
}

constexpr int kCame8bitWarps = kCame8bitThreads / kWarpSize;
static_assert(kCame8bitStrip == kLaneValues * kWarpSize);

// This thread's part of its block's tile: rows begin, begin + kCame8bitWarps, .. of matrix b, `count` columns from col
// on.
struct Tile {
  int64_t b, chunk, begin, end, col;
  int strip, count;
  int64_t columns;  // of the strip
};

__device__ inline Tile tile_of(const Came8bitTensor& t) {
  const uint32_t number = blockIdx.x - t.first_tile, strips = static_cast<uint32_t>(t.strips);
  const uint32_t rest = number / strips, chunks = static_cast<uint32_t>(t.chunks);
  Tile tile;
  tile.strip = static_cast<int>(number % strips), tile.b = rest / chunks, tile.chunk = rest % chunks;
  const int64_t first = tile.chunk * kCame8bitRows, last = first + kCame8bitRows;
  tile.begin = first + threadIdx.x / kWarpSize, tile.end = last < t.R ? last : t.R;
  const int64_t block = static_cast<int64_t>(tile.strip / t.block_strips) * t.block;
  const int64_t within = static_cast<int64_t>(tile.strip % t.block_strips) * t.strip_width;
  int64_t columns = t.strip_width;
  columns = t.block - within < columns ? t.block - within : columns;
  columns = t.C - block - within < columns ? t.C - block - within : columns;
  tile.columns = columns > 0 ? columns : 0;
  const int64_t at = threadIdx.x % kWarpSize * kLaneValues, count = tile.columns - at;
  tile.col = block + within + at, tile.count = static_cast<int>(count < 0             ? 0
                                                                : count > kLaneValues ? kLaneValues
                                                                                      : count);
  return tile;
}

// A row's part of this thread; the last row of a parameter that is not factored may end early.
struct Piece {
  int64_t row, offset;  // among all rows; of the first value
  int count;
  bool whole;
};

__device__ inline Piece piece_of(const Came8bitTensor& t, const Tile& tile, int64_t row) {
  Piece piece;
  piece.row = tile.b * t.R + row, piece.offset = piece.row * t.C + tile.col;
  piece.count = row < tile.end ? tile.count : 0;
  if (!t.factored) {
    const int64_t left = t.n - piece.offset;
    piece.count = left >= piece.count ? piece.count : left > 0 ? static_cast<int>(left) : 0;
  }
  piece.whole = t.aligned && piece.count == kLaneValues;
  return piece;
}

// A hyperparameter of the launch's tensor `owner`. What is kept between steps is averaged with hyper64: 1 - beta in
// fp32 is off by 1e-5 of itself.
__device__ inline float hyper(const Came8bitLaunch& a, int owner, int column) {
  return static_cast<float>(load_global(a.hyper + static_cast<int64_t>(owner) * kCame8bitHyper + column));
}
__device__ inline double hyper64(const Came8bitLaunch& a, int owner, int column) {
  return load_global(a.hyper + static_cast<int64_t>(owner) * kCame8bitHyper + column);
}

// min(1, clip / rms(u)) * factor: what g is multiplied with besides rows and columns.
__device__ inline float clipped(const Came8bitLaunch& a, const Came8bitTensor& t, int owner) {
  const double rms = sqrt(load_global(t.w_square) / hyper64(a, owner, 13)) / hyper64(a, owner, 7);
  return static_cast<float>((rms > 1.0 ? 1.0 / rms : 1.0)) * hyper(a, owner, 8);
}

// The sums of the tile's columns, over the rows of each warp and then over the warps, in order.
__device__ inline void store_columns(const Came8bitTensor& t, const Tile& tile, const float (&column)[kLaneValues],
                                     Shared<float> slots) {
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j) slots[threadIdx.x * kLaneValues + j] = column[j];
  __syncthreads();
  const int64_t c = threadIdx.x;
  if (c >= tile.columns) return;
  float sum = 0.0f;
#pragma unroll
  for (int warp = 0; warp < kCame8bitWarps; ++warp) sum += slots[warp * kCame8bitStrip + c];
  const int64_t first = tile.col - static_cast<int64_t>(threadIdx.x % kWarpSize) * kLaneValues;
  store_global(t.col_part + (tile.b * t.chunks + tile.chunk) * t.C + first + c, sum);
}

__device__ inline void load_columns(const float* columns, const Came8bitTensor& t, const Tile& tile,
                                    float (&c)[kLaneValues]) {
#pragma unroll
  for (int j = 0; j < kLaneValues; ++j)
    c[j] = j < tile.count ? load_global(columns + tile.b * t.C + tile.col + j) : 0.0f;
}

}  // namespace sana_ext::cuda
