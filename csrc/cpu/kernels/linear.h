// y = x W^T + b for a few rows of x: the weight is read once and converted in registers. (With many rows the glue
// converts panels of the weight and leaves the product to torch.)
#pragma once
#include "../../common/dtype.h"
#include "isa.h"

namespace sana_ext::cpu {

constexpr int64_t kLinearBlock = 8;  // outputs of one item

struct LinearFewRows {
  int64_t M, K, F;
  const void* x;    // [M, K] accumulators, dense
  ConstPtr weight;  // [F, K], last dimension dense
  int64_t weight_stride;
  const void* bias;  // [F] accumulators, or nullptr
  Ptr y;             // [M, F] dense
  bool fp64;         // accumulator type
};
SANA_EXT_KERNEL(linear_few_rows, LinearFewRows)  // items are blocks of kLinearBlock outputs

}  // namespace sana_ext::cpu
