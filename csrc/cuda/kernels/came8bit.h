// CAME with an 8-bit first moment on the GPU, many parameters in one launch; the formulas and the four phases are
// sana_ext/reference/came8bit.py's.
//
// A tile is up to 128 rows of a matrix and a strip of up to 256 columns that ends where an 8-bit block does: one thread
// block, a row to a warp, 8 columns to a lane. So the sums over columns, and what belongs to a column, stay in
// registers while the rows go by. A tile leaves one sum per row and one per column; came8bit_after adds those up in
// their order. Phase 2 also leaves the least and the largest new moment of each row and strip, from which
// came8bit_before makes the scales of phase 3; came8bit_commit stores them when no block reads the old ones any more.
//
// Bytes per value of bf16 (fp32) parameters: g in phase 0, 2 (4); g in 1, 2 (4); g and m in 2, 3 (5); g, m, p and the
// new m and p in 3, 8 (14): 15 (27), and about 0.35 for the sums of the tiles.
#pragma once
#include "../../common/dtype.h"
#include "runtime.h"

namespace sana_ext::cuda {

// Register budget, checked by `make kernels`: came8bit_squares_kernel 80, came8bit_norm_kernel 80
// Register budget, checked by `make kernels`: came8bit_residual_kernel 128, came8bit_apply_kernel 128
// Register budget, checked by `make kernels`: came8bit_table_kernel 64, came8bit_after_kernel 64
// Register budget, checked by `make kernels`: came8bit_totals_kernel 64, came8bit_found_kernel 40
// Register budget, checked by `make kernels`: came8bit_before_kernel 64, came8bit_commit_kernel 40
// Machine code, checked by `make kernels`: came8bit_squares_kernel: LDG.128; came8bit_norm_kernel: LDG.128
// Machine code, checked by `make kernels`: came8bit_residual_kernel: LDG.128 LDG.64
// Machine code, checked by `make kernels`: came8bit_apply_kernel: LDG.128 STG.128 LDG.64 STG.64

constexpr int kCame8bitHyper = 14;     // numbers per parameter, in the order of the reference's Hyper
constexpr int kCame8bitRows = 128;     // of a tile
constexpr int kCame8bitStrip = 256;    // columns of a tile, at most
constexpr int kCame8bitThreads = 256;  // of a block; also the rows or columns of an item of came8bit_after and _before

// One parameter: B matrices [R, C]. One that is not factored is seen as rows of whole 8-bit blocks, or, without codes,
// of 256 values; the last row may be short. All tensors are dense.
struct Came8bitTensor {
  int64_t B, R, C, n;              // n: values in all
  int64_t units;                   // of one matrix: unit_rows rows that begin an 8-bit block
  void* p;                         // [n] fp32 or bf16
  const void* g;                   // [n] fp32 or bf16
  uint8_t* codes;                  // [n], or nullptr
  float* scales;                   // [B, units, blocks], linear [B, units, blocks, 2]: low, step
  float* m;                        // [n] where there are no codes
  float* second;                   // row [B, R], or v [n] if not factored
  float *col, *res_row, *res_col;  // [B, C], [B, R], [B, C]
  // What is kept between phases; the sharers of a parameter add up the first five.
  float *w_total, *w_col, *w_square, *w_res_total, *w_res_col;  // [B], [B, C], [1], [B], [B, C]
  float *w_row, *w_res_row;                                     // [B, R] each
  // What is not. Of every tile: sums of rows [strips, B, R] and of columns [B, chunks, C]; least and largest moment
  // [strips, B, R] each; then scales [B, units, blocks, 2].
  float *row_part, *col_part, *low, *high, *fresh;
  int32_t block, blocks, unit_rows;             // values per block of a row, blocks per row, rows per unit
  int32_t strip_width, block_strips, strips;    // columns per strip, strips per block and per row
  int32_t chunks, row_items, col_items, items;  // tiles over the rows of a matrix; items of each matrix, and in all
  int32_t tiles;
  uint32_t first_tile, first_item;  // those of the parameters before
  bool factored, linear;
  bool p_bf16, g_bf16, aligned;  // aligned: rows and blocks begin at multiples of 8 values and of 16 bytes
};

// Fills in the sizes from those of the op's `geometry`, the codes, and the pointers p, g, codes and m.
void came8bit_layout(Came8bitTensor& t, int64_t B, int64_t R, int64_t C, bool factored, int64_t block);
// Floats behind row_part .. fresh, and their places in `space`.
int64_t came8bit_space(const Came8bitTensor& t);
void came8bit_place(Came8bitTensor& t, float* space);
void came8bit_place_work(Came8bitTensor& t, float* work);
int64_t came8bit_work(const Came8bitTensor& t);

struct Came8bitLaunch {
  Came8bitTensor* tensors;           // [count], in the device's memory
  int32_t *tile_owner, *item_owner;  // [tiles], [items]: the tensor of each
  float* tile_sums;                  // [tiles]
  double* item_sums;                 // [items, 2]: new averages, means
  int32_t* flags;                    // [count]: 1 where squares of g overflow
  const double* hyper;               // [count, 14]
  const int64_t* seeds;              // [count] of stochastic rounding, -1: to the nearest; or nullptr
  float* found_inf;                  // [1]; with any value but 0 no phase but 0 touches anything
  int32_t count, phase;
  uint32_t tiles, items;
};

// As many parameters as a kernel's arguments have room for.
#ifdef SANA_EXT_EMULATOR
constexpr int kCame8bitTensors = 4;
#else
constexpr int kCame8bitTensors = 100;
#endif
// Writes tensors [first, first + count) of the table and their owners: no copy from the host, so a CUDA graph can
// repeat it.
struct Came8bitTable {
  Came8bitLaunch launch;
  int32_t first, count;
  Came8bitTensor tensors[kCame8bitTensors];
};
static_assert(sizeof(Came8bitTable) <= 32764);
cudaError_t came8bit_table(const Came8bitTable& args, cudaStream_t stream);

// The pass of one phase over the tiles, without what comes before and after it.
cudaError_t came8bit_pass(const Came8bitLaunch& args, cudaStream_t stream);

// Phases [first, last] of all parameters, whose table is written.
cudaError_t came8bit_phases(Came8bitLaunch args, int first, int last, cudaStream_t stream);

}  // namespace sana_ext::cuda
