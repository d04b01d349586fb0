// The instruction sets that kernels are compiled for, worst first, and the best that this processor has. No
// torch here: CMake reads the lists, and runs this to build for one machine alone.
#pragma once

#if PYSPEC_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#elif defined(__aarch64__) && defined(__APPLE__)
#include <sys/sysctl.h>
#endif

// Each set has all that those before it have, but for avx_vnni, which processors with AVX-512 may lack
// (set_below). X is called with a set's name and what else it is given.
#if PYSPEC_X86
#define PYSPEC_EACH_SET(X, ...) \
  X(portable, __VA_ARGS__)      \
  X(avx2, __VA_ARGS__)          \
  X(avx_vnni, __VA_ARGS__)      \
  X(avx512, __VA_ARGS__)        \
  X(avx512_vnni, __VA_ARGS__)   \
  X(avx512_bf16, __VA_ARGS__)   \
  X(amx_bf16, __VA_ARGS__)
#elif PYSPEC_ARM
#define PYSPEC_EACH_SET(X, ...) \
  X(portable, __VA_ARGS__)      \
  X(neon, __VA_ARGS__)          \
  X(neon_dot, __VA_ARGS__)      \
  X(neon_bf16, __VA_ARGS__)
#else
#define PYSPEC_EACH_SET(X, ...) X(portable, __VA_ARGS__)
#endif

namespace pyspec {

#define PYSPEC_NAME(set, ...) #set,
constexpr const char* kInstructionSets[] = {PYSPEC_EACH_SET(PYSPEC_NAME)};
#undef PYSPEC_NAME
constexpr int kSetCount = sizeof(kInstructionSets) / sizeof(*kInstructionSets);

// Indices into kInstructionSets.
#define PYSPEC_INDEX(set, ...) kSet_##set,
enum { PYSPEC_EACH_SET(PYSPEC_INDEX) };
#undef PYSPEC_INDEX

#if PYSPEC_X86
// The best of the sets that all processors with this one have.
constexpr int set_below(int set) { return set == kSet_avx512 ? kSet_avx2 : set - 1; }

inline bool has_avx_vnni() {
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 1, &a, &b, &c, &d) && (a >> 4 & 1);
}

inline bool amx_granted() {
#ifdef __linux__
  unsigned a, b, c, d;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  bool has_tiles = d >> 24 & 1, has_bf16 = d >> 22 & 1, has_int8 = d >> 25 & 1;
  // Linux hands out the tile state per process on request (ARCH_REQ_XCOMP_PERM, XTILEDATA).
  return has_tiles && has_bf16 && has_int8 && syscall(SYS_arch_prctl, 0x1023, 18) == 0;
#else
  return false;
#endif
}

// The best set, an index into kInstructionSets.
inline int processor_instruction_set() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return kSet_portable;
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return has_avx_vnni() ? kSet_avx_vnni : kSet_avx2;
  if (!__builtin_cpu_supports("avx512vnni")) return kSet_avx512;
  if (!__builtin_cpu_supports("avx512bf16")) return kSet_avx512_vnni;
  return amx_granted() ? kSet_amx_bf16 : kSet_avx512_bf16;
}

// Whether this processor runs a set that is not above its best. Asked once: a virtual machine's cpuid takes
// microseconds, which every call of an op would pay where PYSPEC_ISA is set.
inline bool has_instruction_set(int set) {
  static const bool has_vnni = has_avx_vnni();
  return set != kSet_avx_vnni || has_vnni;
}
#elif PYSPEC_ARM && defined(__aarch64__)
struct ArmFeatures {
  bool dotprod, i8mm, bf16;
};
inline ArmFeatures arm_features() {
#ifdef __linux__
  unsigned long first = getauxval(AT_HWCAP), second = getauxval(AT_HWCAP2);
  return {(first >> 20 & 1) != 0, (second >> 13 & 1) != 0, (second >> 14 & 1) != 0};  // of asm/hwcap.h
#elif defined(__APPLE__)
  auto has = [](const char* name) {
    int found = 0;
    size_t bytes = sizeof(found);
    return sysctlbyname(name, &found, &bytes, nullptr, 0) == 0 && found;
  };
  return {has("hw.optional.arm.FEAT_DotProd"), has("hw.optional.arm.FEAT_I8MM"),
          has("hw.optional.arm.FEAT_BF16")};
#else
  return {};
#endif
}
inline int processor_instruction_set() {
  ArmFeatures has = arm_features();
  if (!has.dotprod) return 1;
  return has.i8mm && has.bf16 ? 3 : 2;
}
#else  // one set, or those of a processor that is emulated
inline int processor_instruction_set() { return kSetCount - 1; }
#endif

#if !PYSPEC_X86
constexpr int set_below(int set) { return set - 1; }
inline bool has_instruction_set(int) { return true; }
#endif

}  // namespace pyspec
