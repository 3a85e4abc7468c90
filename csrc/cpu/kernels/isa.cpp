#include "isa.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace sana_ext::cpu {
namespace {

#if defined(__x86_64__)
bool has_f16c() {  // a word that older compilers' __builtin_cpu_supports does not know
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#endif

Isa best_available() {
#if defined(__x86_64__) && !defined(SANA_EXT_BASELINE_ONLY)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && has_f16c();
  if (avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    return Isa::kAvx512;
  }
  if (avx2) return Isa::kAvx2;
#endif
  return Isa::kBaseline;
}

Isa choose() {
  const Isa best = best_available();
  const char* wanted = std::getenv("SANA_EXT_CPU_ISA");
  if (wanted == nullptr || *wanted == '\0') return best;
  for (int level = 0; level <= static_cast<int>(best); ++level) {
    if (std::strcmp(wanted, isa_name(static_cast<Isa>(level))) == 0) return static_cast<Isa>(level);
  }
  throw std::runtime_error("SANA_EXT_CPU_ISA=" + std::string(wanted) +
                           " is not available here; this processor's best level is " + isa_name(best));
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa level) {
  switch (level) {
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx2:
      return "avx2";
    default:
#if defined(__aarch64__)
      return "neon";
#else
      return "baseline";
#endif
  }
}

bool has_native_arithmetic(Dtype dtype) {
  if (dtype != Dtype::kBFloat16 && dtype != Dtype::kFloat16) return true;
#if defined(__x86_64__)
  // Every processor with AMX has the AVX-512 instructions too. CPUID leaf 7: subleaf 0 EDX[23] fp16, subleaf 1 EAX[5]
  // bf16.
  if (isa() != Isa::kAvx512) return false;
  unsigned eax = 0, ebx = 0, ecx = 0, edx = 0;
  if (dtype == Dtype::kFloat16) return __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx >> 23 & 1);
  return __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax >> 5 & 1);
#elif defined(__aarch64__) && defined(__linux__)
  if (dtype == Dtype::kFloat16) return getauxval(AT_HWCAP) >> 10 & 1;  // HWCAP_ASIMDHP
  return getauxval(AT_HWCAP2) >> 14 & 1;                               // HWCAP2_BF16
#else
  return true;  // unknown processor: torch's own
#endif
}

}  // namespace sana_ext::cpu

// For Python (sana_ext/_extension.py, through ctypes).
#define SANA_EXT_EXPORT extern "C" __attribute__((visibility("default")))

// The level in use; nullptr where SANA_EXT_CPU_ISA names one that is not available here.
SANA_EXT_EXPORT const char* sana_ext_cpu_isa() {
  try {
    return sana_ext::cpu::isa_name(sana_ext::cpu::isa());
  } catch (const std::runtime_error&) {
    return nullptr;
  }
}

// The best level of this processor.
SANA_EXT_EXPORT const char* sana_ext_cpu_best_isa() { return sana_ext::cpu::isa_name(sana_ext::cpu::best_available()); }
