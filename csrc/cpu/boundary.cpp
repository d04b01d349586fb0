#include "boundary.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <string>
#include <thread>
#include <utility>
#include <vector>

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

const std::string& available() {
  static const std::string names = [] {
    std::string joined;
    for (int i = 0; i <= best(); ++i) {
      if (has_instruction_set(i)) joined += std::string(i ? ", " : "") + kInstructionSets[i];
    }
    return joined;
  }();
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

// The items of a loop, shared out: every thread has a run of neighbours of its own, so that it reads memory
// in order, and helps with the others' when that is done.
struct alignas(64) Run {
  std::atomic<int64_t> taken{0};
};

int64_t work(Run* runs, int64_t threads, int64_t thread, int64_t items, ParallelBody body, void* context) {
  int64_t finished = 0;
  for (int64_t turn = 0; turn < threads; ++turn) {
    int64_t owner = (thread + turn) % threads;
    int64_t first = items * owner / threads, count = items * (owner + 1) / threads - first;
    for (int64_t i; (i = runs[owner].taken.fetch_add(1, std::memory_order_relaxed)) < count; ++finished)
      body(context, first + i);
  }
  return finished;
}

}  // namespace

void parallel_for(int64_t items, ParallelBody body, void* context) {
  if (items <= 1) {
    if (items == 1) body(context, 0);
    return;
  }
  int64_t threads = torch::stable::get_num_threads();
  if (threads > items) threads = items;
  std::vector<Run> runs(threads);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    work(runs.data(), threads, first, items, body, context);
  });
}

namespace {

struct Team {
  Run* runs;                   // [loops, threads]
  std::atomic<int64_t>* done;  // [loops]
  int64_t loops, threads;
};

thread_local Team team{};
thread_local int64_t team_thread = 0, team_loop = 0;

void wait_a_little(int64_t turn) {
#if PYSPEC_X86
  __builtin_ia32_pause();
#endif
  if (turn % 4096 == 4095) std::this_thread::yield();  // more threads than processors
}

}  // namespace

void run_team(int64_t most_loops, void (*program)(void*), void* context) {
  int64_t threads = torch::stable::get_num_threads();
  std::vector<Run> runs(most_loops * threads);
  std::vector<std::atomic<int64_t>> done(most_loops);
  torch::stable::parallel_for(0, threads, 1, [&](int64_t first, int64_t) {
    Team outer = std::exchange(team, Team{runs.data(), done.data(), most_loops, threads});
    int64_t outer_thread = std::exchange(team_thread, first), outer_loop = std::exchange(team_loop, 0);
    program(context);
    team = outer, team_thread = outer_thread, team_loop = outer_loop;
  });
}

void team_parallel_for(int64_t items, ParallelBody body, void* context) {
  STD_TORCH_CHECK(team_loop < team.loops, "a program of kernels runs more loops than it announced");
  Run* runs = team.runs + team_loop * team.threads;
  std::atomic<int64_t>& done = team.done[team_loop++];
  int64_t finished = work(runs, team.threads, team_thread, items, body, context);
  if (finished) done.fetch_add(finished, std::memory_order_release);
  for (int64_t turn = 0; done.load(std::memory_order_acquire) < items; ++turn) wait_a_little(turn);
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

extern "C" __attribute__((visibility("default"))) const char* pyspec_isa_reason() {
  if (pyspec::requested()) return "asked for by PYSPEC_ISA";
  return pyspec::best() == pyspec::processor_instruction_set() ? "the best this processor has"
                                                               : "the best this build has";
}
