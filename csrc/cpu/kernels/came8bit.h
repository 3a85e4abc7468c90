// One parameter's CAME update in four phases (sana_ext/reference/came8bit.py). Bytes of memory traffic per value, fp32
// (bf16) parameters and gradients: phase 0 reads g, 4 (2); 1 reads g, 4 (2); 2 reads g and the 8-bit m, 5 (3); 3 reads
// g, m and p and writes m and p, 14 (8): 27 (15) in all, less what a cache keeps of one parameter between phases 1
// to 3.
#pragma once
#include "../../common/dtype.h"
#include "isa.h"

namespace sana_ext::cpu {

// Every tensor is dense. A parameter is B matrices [R, C]; a unit is unit_rows rows of one matrix (fewer at its end)
// and begins an 8-bit block; an item of work is chunk_units units. Not factored: one run of R * C values with second
// moments.
struct Came8bit {
  int64_t B, R, C;
  bool factored, linear;
  int64_t block, unit_rows, units,
      blocks;                      // values per block of a row, rows per unit, units per matrix, blocks per unit
  int64_t chunk_units, chunks;     // chunks per matrix
  Ptr p;                           // [B, R, C]
  ConstPtr g;                      // [B, R, C]
  uint8_t* codes;                  // [B, R, C], or nullptr
  float* scales;                   // [B * units, blocks], linear [B * units, blocks, 2]: low, step
  float* m;                        // [B, R, C] where there are no codes
  float* second;                   // row [B, R], or v [R, C] if not factored
  float *col, *res_row, *res_col;  // [B, C], [B, R], [B, C]
  // Between phases; the sharers of a parameter add up the first five.
  float *w_total, *w_col, *w_square, *w_res_total, *w_res_col;  // [B], [B, C], [1], [B], [B, C]
  float *w_row, *w_res_row;                                     // [B, R] each
  float* partial;   // [B * chunks, C] column sums of chunks; w_col or w_res_col itself where chunks is 1
  double* sums;     // [B * chunks]
  int* not_finite;  // set to 1 by phase 0
  double lr, weight_decay, beta1, beta2, beta3, eps1, eps2, clip, factor, correct1, correct2, correct3;
  double rows, numel;  // of the whole parameter
  bool by_chance;      // rounding of a bf16 parameter
  uint32_t seed;
};

// Items [begin, end) of the B * chunks items.
SANA_EXT_KERNEL(came8bit_squares, Came8bit)
SANA_EXT_KERNEL(came8bit_norm, Came8bit)
SANA_EXT_KERNEL(came8bit_residual, Came8bit)
SANA_EXT_KERNEL(came8bit_apply, Came8bit)

// What comes before and after the items of phases [begin, end): statistics of rows and columns, sums of items in order.
SANA_EXT_KERNEL(came8bit_before, Came8bit)
SANA_EXT_KERNEL(came8bit_after, Came8bit)

}  // namespace sana_ext::cpu
