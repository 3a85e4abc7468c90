// What the ops of this family demand of their arguments on every device.
#pragma once
#include "tensors.h"

namespace sana_ext::glue {

inline void check_dwconv_glu(const Tensor& u, const Tensor& weight, const OptionalTensor& bias, int64_t height,
                             int64_t width) {
  check(u.dim() == 3, "u must have shape [B, N, 2F]");
  check(height >= 1 && width >= 1 && u.size(1) % height == 0 && u.size(1) / height == width,
        "u must have height * width tokens");
  check(u.size(2) % 2 == 0, "u must have an even number of channels");
  check_shape(weight, "weight", {u.size(2), 1, 3, 3});
  check_shape(bias, "bias", {u.size(2)});
  check_same_precision(u, weight, "weight");
  check_same_precision(u, bias, "bias");
}

inline void check_dwconv_glu_gradient(const Tensor& dout, const Tensor& u) {
  check_shape(dout, "dout", {u.size(0), u.size(1), u.size(2) / 2});
  check(dout.scalar_type() == u.scalar_type(), "dout must have the dtype of u");
}

}  // namespace sana_ext::glue
