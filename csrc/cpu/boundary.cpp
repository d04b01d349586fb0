#include "boundary.h"

#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#if PYSPEC_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

namespace pyspec {
namespace {

// In the order of the kernel tables, worst first.
const char* const kNames[] = {"portable", "avx2", "avx512", "avx512_vnni", "avx512_bf16", "amx_bf16"};

#if PYSPEC_X86
bool amx_granted() {
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

int best_instruction_set() {
  if (!__builtin_cpu_supports("avx2") || !__builtin_cpu_supports("fma")) return 0;
  bool avx512 = __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  if (!avx512) return 1;
  if (!__builtin_cpu_supports("avx512vnni")) return 2;
  if (!__builtin_cpu_supports("avx512bf16")) return 3;
  return amx_granted() ? 5 : 4;
}
#else
int best_instruction_set() { return 0; }
#endif

int best() {
  static const int index = best_instruction_set();
  return index;
}

const char* requested() {
  const char* name = std::getenv("PYSPEC_ISA");
  return name && *name ? name : nullptr;
}

}  // namespace

int instruction_set() {
  const char* name = requested();
  if (!name) return best();
  std::string available;
  for (int i = 0; i <= best(); ++i) {
    if (!std::strcmp(name, kNames[i])) return i;
    available += std::string(i ? ", " : "") + kNames[i];
  }
  STD_TORCH_CHECK(false, "PYSPEC_ISA must be one of ", available, " on this processor, got ", name);
  return 0;
}

void parallel_for(int64_t items, ParallelBody body, void* context) {
  if (items <= 1) {
    if (items == 1) body(context, 0);
    return;
  }
  std::atomic<int64_t> next{0};
  int64_t threads = torch::stable::get_num_threads();
  if (threads > items) threads = items;
  torch::stable::parallel_for(0, threads, 1, [&](int64_t, int64_t) {
    for (int64_t item; (item = next.fetch_add(1, std::memory_order_relaxed)) < items;) body(context, item);
  });
}

float* workspace(int64_t floats) {
  struct Free {
    void operator()(float* p) const { std::free(p); }
  };
  static thread_local std::unique_ptr<float, Free> buffer;
  static thread_local int64_t capacity = 0;
  if (floats > capacity) {
    buffer.reset();
    capacity = 0;
    int64_t bytes = (floats * 4 + 63) / 64 * 64;
    buffer.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
    STD_TORCH_CHECK(buffer, "out of memory for a workspace of ", bytes, " bytes");
    capacity = floats;
  }
  return buffer.get();
}

}  // namespace pyspec

// For pyspec info. An instruction set asked for that is not there is reported by the ops themselves.
extern "C" __attribute__((visibility("default"))) const char* pyspec_isa_name() {
  const char* name = pyspec::requested();
  return name ? name : pyspec::kNames[pyspec::best()];
}

extern "C" __attribute__((visibility("default"))) const char* pyspec_isa_reason() {
  return pyspec::requested() ? "asked for by PYSPEC_ISA" : "the best this processor has";
}
