// The instruction sets that kernels are compiled for, worst first, and the best that this processor has. No
// torch here: CMake runs it too, to build for this machine alone.
#pragma once

#if PYSPEC_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pyspec {

constexpr const char* kInstructionSets[] = {"portable",    "avx2",        "avx512",
                                            "avx512_vnni", "avx512_bf16", "amx_bf16"};

#if PYSPEC_X86
inline bool amx_granted() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  bool has_tiles = d >> 24 & 1, has_bf16 = d >> 22 & 1;
  // Linux hands out the tile state per process on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
  return has_tiles && has_bf16 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// An index into kInstructionSets. The processor has every set before it too.
inline int processor_instruction_set() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return 1;
  if (!__builtin_cpu_supports("avx512vnni")) return 2;
  if (!__builtin_cpu_supports("avx512bf16")) return 3;
  return amx_granted() ? 5 : 4;
}
#else
inline int processor_instruction_set() { return 0; }
#endif

}  // namespace pyspec
