// What every csrc/cpu/<op>.cpp takes: tensors as pointers, and torch's threads.
#pragma once
#include "../glue/tensors.h"
#include "kernels/isa.h"

namespace sana_ext::cpu {

using namespace glue;

// Runs kernel(args, begin, end) over [0, items) on torch's thread pool; `grain` items are worth a task (about 50 us).
template <class Args>
void parallel(void (*kernel)(const Args&, int64_t, int64_t), const Args& args, int64_t items, int64_t grain) {
  if (items == 0) return;
  torch::stable::parallel_for(0, items, grain < 1 ? 1 : grain,
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
}

constexpr int64_t kGrainElements = 32768;  // elements of streaming work worth a task

}  // namespace sana_ext::cpu
