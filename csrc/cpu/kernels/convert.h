// Matrices between their stored type and accumulators, and sums over rows: what surrounds a matrix product in fp32.
#pragma once
#include "../../common/dtype.h"
#include "isa.h"

namespace sana_ext::cpu {

// target = source + addend, rounded once. The sum is taken in fp64 if the source is fp64, else in fp32; target has the
// source's precision or is 16-bit. target may be the addend.
struct Convert {
  int64_t rows, cols;
  ConstPtr source;  // [rows, cols], last dimension dense
  int64_t source_stride;
  const void* addend;  // [rows, cols] accumulators, row stride 0 for a bias; nullptr: nothing is added
  int64_t addend_stride;
  Ptr target;  // [rows, cols], last dimension dense
  int64_t target_stride;
};
SANA_EXT_KERNEL(convert, Convert)  // items are rows

constexpr int64_t kColumnSumsBlock = 64;  // rows per partial sum

// partial[block, c] = sum of source[r, c] over the kColumnSumsBlock rows of the block, in order.
struct ColumnSums {
  int64_t rows, cols;
  ConstPtr source;  // [rows, cols], last dimension dense
  int64_t source_stride;
  void* partial;  // [ceil(rows / kColumnSumsBlock), cols] accumulators
};
SANA_EXT_KERNEL(column_sums, ColumnSums)  // items are blocks

}  // namespace sana_ext::cpu
