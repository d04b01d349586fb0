#include "boundary.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>

#include "threads.h"

namespace pyspec {
namespace {

// An index into kInstructionSets. A build for one machine has none above its own.
#ifndef PYSPEC_BEST_BUILT
#define PYSPEC_BEST_BUILT pyspec::kSetCount - 1
#endif

int best() {
  static const int index = std::min(processor_instruction_set(), PYSPEC_BEST_BUILT);
  return index;
}

// The names of those up to an index that are meant, worst first.
template <class Meant>
std::string names_of(int last, Meant meant) {
  std::string joined;
  for (int i = 0; i <= last; ++i) {
    if (meant(i)) joined += std::string(joined.empty() ? "" : ", ") + kInstructionSets[i];
  }
  return joined;
}

const std::string& available() {
  static const std::string names = names_of(best(), has_instruction_set);
  return names;
}

const char* requested() {
  const char* name = std::getenv("PYSPEC_ISA");
  return name && *name ? name : nullptr;
}

}  // namespace

int instruction_set() {
  const char* name = requested();
  if (!name) return best();
  for (int i = 0; i <= best(); ++i) {
    if (has_instruction_set(i) && !std::strcmp(name, kInstructionSets[i])) return i;
  }
  STD_TORCH_CHECK(false, "PYSPEC_ISA must be one of ", available(), " on this processor, got ", name);
  return 0;
}

namespace {

// When the library is loaded, or a child of an earlier fork would not know that it is one.
[[maybe_unused]] const bool has_region = [] {
  set_region([](int64_t threads, Work work, void* context) {
    torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) { work(context, first); });
  });
  return true;
}();

}  // namespace

void parallel_for(int64_t items, ParallelBody body, void* context) {
  share_items(torch::stable::get_num_threads(), items, body, context);
}

void run_team(int64_t most_loops, void (*program)(void*), void* context) {
  share_program(torch::stable::get_num_threads(), most_loops, program, context);
}

void team_parallel_for(int64_t items, ParallelBody body, void* context) {
  share_items_of_program(items, body, context);
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
  return name ? name : pyspec::kInstructionSets[pyspec::best()];
}

// All that PYSPEC_ISA may name, worst first.
extern "C" __attribute__((visibility("default"))) const char* pyspec_isa_available() {
  return pyspec::available().c_str();
}

// Those that were compiled, and those that this processor has.
extern "C" __attribute__((visibility("default"))) const char* pyspec_isa_compiled() {
  static const std::string names = pyspec::names_of(PYSPEC_BEST_BUILT, [](int) { return true; });
  return names.c_str();
}

extern "C" __attribute__((visibility("default"))) const char* pyspec_isa_found() {
  static const std::string names =
      pyspec::names_of(pyspec::processor_instruction_set(), pyspec::has_instruction_set);
  return names.c_str();
}

extern "C" __attribute__((visibility("default"))) const char* pyspec_isa_reason() {
  if (pyspec::requested()) return "asked for by PYSPEC_ISA";
  return pyspec::best() == pyspec::processor_instruction_set() ? "the best this processor has"
                                                               : "the best this build has";
}
