// Run-time choice of the instruction set. Every <op>.cpp in this folder is compiled once per level with
// -DSANA_EXT_ISA=<level>; SANA_EXT_KERNEL declares one function per level and the dispatcher that picks.
#pragma once
#include <cstdint>

#include "../../common/dtype.h"

namespace sana_ext::cpu {

// Levels in rising order. On x86-64: baseline (SSE2), avx2 (+FMA+F16C), avx512 (F+BW+DQ+VL). On AArch64 the only level
// is NEON.
enum class Isa : int { kBaseline, kAvx2, kAvx512 };

// The level used by this process: the best the processor has, or the one SANA_EXT_CPU_ISA names (an unknown or
// unavailable name throws std::runtime_error). Read once.
Isa isa();
const char* isa_name(Isa level);

// Whether this processor multiplies matrices of a 16-bit type in that type (avx512_bf16 or AMX, avx512_fp16, the bf16
// and fp16 instructions of AArch64), so that torch's own product is the fast one. A forced level below AVX-512 has
// none.
bool has_native_arithmetic(Dtype dtype);

}  // namespace sana_ext::cpu

#if defined(__x86_64__) && !defined(SANA_EXT_BASELINE_ONLY)
#define SANA_EXT_KERNEL(name, Args)                                \
  namespace baseline {                                             \
  void name(const Args&, int64_t, int64_t);                        \
  }                                                                \
  namespace avx2 {                                                 \
  void name(const Args&, int64_t, int64_t);                        \
  }                                                                \
  namespace avx512 {                                               \
  void name(const Args&, int64_t, int64_t);                        \
  }                                                                \
  inline void name(const Args& args, int64_t begin, int64_t end) { \
    switch (isa()) {                                               \
      case Isa::kAvx512:                                           \
        return avx512::name(args, begin, end);                     \
      case Isa::kAvx2:                                             \
        return avx2::name(args, begin, end);                       \
      default:                                                     \
        return baseline::name(args, begin, end);                   \
    }                                                              \
  }
#else
#define SANA_EXT_KERNEL(name, Args)         \
  namespace baseline {                      \
  void name(const Args&, int64_t, int64_t); \
  }                                         \
  inline void name(const Args& args, int64_t begin, int64_t end) { baseline::name(args, begin, end); }
#endif
