// The dynamic codes of csrc/common/code8.h in shared memory.
#pragma once
#include "../../common/code8.h"
#include "primitives.cuh"

namespace sana_ext::cuda {

// A dynamic code in shared memory, with the names of DynamicCode.
struct SharedCode {
  Shared<float> magnitude, border, decade, slope, offset, last;
};
constexpr size_t kCodeBytes = 2 * shared_size<float>(256) + 4 * shared_size<float>(8);

__device__ inline SharedCode take_code(SharedMemory& memory) {
  return {memory.take<float>(256), memory.take<float>(256), memory.take<float>(8),
          memory.take<float>(8),   memory.take<float>(8),   memory.take<float>(8)};
}

// By at least 256 threads, threadIdx.x the number of each; a barrier must follow.
__device__ inline void fill(const SharedCode& t, bool is_signed) {
  const int k = static_cast<int>(threadIdx.x), top = is_signed ? 128 : 255;
  const float here = k <= top ? dynamic_magnitude(k, is_signed) : 0.0f;
  const float next = k < top ? dynamic_magnitude(k + 1, is_signed) : 0.0f;
  t.magnitude[k] = here;
  t.border[k] = (here + next) * 0.5f;
  if (k >= 8) return;
  const int d = k - 1, n = is_signed ? 1 << (d < 0 ? 0 : d) : 2 << (d < 0 ? 0 : d), first = is_signed ? n : n - 1;
  double power = 1.0;
  for (int i = d; i < kCodeDecades - 1; ++i) power *= 10.0;
  t.slope[k] = k == 0 ? 0.0f : static_cast<float>(n / 0.9 * power);
  t.offset[k] = k == 0 ? 0.0f : static_cast<float>(first - n / 9.0 - 1e-3);
  t.last[k] = k == 0 ? 0.0f : static_cast<float>(first + n - 1);
  const int below = is_signed ? (1 << k) - 1 : (2 << k) - 2;  // decade k begins above this index
  t.decade[k] =
      k == kCodeDecades ? 4.0f : (dynamic_magnitude(below, is_signed) + dynamic_magnitude(below + 1, is_signed)) * 0.5f;
}

}  // namespace sana_ext::cuda
