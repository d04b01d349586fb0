// What every CPU binding needs: the instruction set in use, torch's threads, and checks that keep a direct
// caller of torch.ops.pyspec.* from reading outside a tensor.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <tuple>

#include "../element.h"
#include "instruction_sets.h"
#include "params/linear.h"

// Declares a kernel's entry point for every instruction set and a table to pick from. Entry points are weak:
// a set has none where the kernel's code would be that of the set below it, or where the set was not built
// (CMakeLists.txt).
#define PYSPEC_DECLARE(set, name, Params) \
  extern "C" __attribute__((weak, visibility("hidden"))) void name##_##set(const Params&);
#define PYSPEC_ENTRY_IN(set, name, Params) name##_##set,
#define PYSPEC_KERNEL_TABLE(name, Params)                     \
  PYSPEC_EACH_SET(PYSPEC_DECLARE, name, Params)               \
  static constexpr pyspec::KernelTable<Params> name##_table { \
    {                                                         \
      PYSPEC_EACH_SET(PYSPEC_ENTRY_IN, name, Params)          \
    }                                                         \
  }

namespace pyspec {

// A kernel's entry points by instruction set, worst first, of which the first is always there.
template <class Params>
struct KernelTable {
  void (*entries[kSetCount])(const Params&);

  auto operator[](int instruction_set) const {
    while (!entries[instruction_set]) instruction_set = set_below(instruction_set);
    return entries[instruction_set];
  }
};

// Index into a kernel table: the best that this processor has and that was built, or what the environment
// variable PYSPEC_ISA names. Throws where that is not to be had.
int instruction_set();

// Shares the items among as many threads as torch has (threads.h).
void parallel_for(int64_t items, ParallelBody body, void* context);

// Runs a program of kernels on as many threads at once, which saves waking them for every kernel. The
// kernels' parallel_for is then team_parallel_for, where the threads meet. A thread that comes late, or
// never, holds nobody up. most_loops bounds how many parallel loops the program runs.
void run_team(int64_t most_loops, void (*program)(void* context), void* context);
void team_parallel_for(int64_t items, ParallelBody body, void* context);

// Format and data of a laid out weight, checked against p.inputs and p.outputs.
void set_weight(LinearParams& p, const torch::stable::Tensor& weight);

// A buffer of the calling thread that only grows, 64-byte aligned: a workspace is not worth page faults a
// call.
float* workspace(int64_t floats);

// An uninitialised tensor on the CPU, without a look-up of aten::new_empty by its name, which costs as much
// as a small kernel.
inline torch::stable::Tensor empty(int64_t rows, int64_t columns, torch::headeronly::ScalarType type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(
      aoti_torch_empty_strided(2, sizes, strides, dtype, aoti_torch_device_type_cpu(), 0, &handle));
  return torch::stable::Tensor(handle);
}

inline int64_t bytes_of(Element element) { return element == Element::kFloat32 ? 4 : 2; }

}  // namespace pyspec
