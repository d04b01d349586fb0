// Stands in for csrc/cuda/boundary.cpp: the CPU as the GPU of a tensor. The bindings are compiled as they
// are.
#include "../../csrc/cuda/boundary.h"

namespace pyspec {

Gpu gpu_of(const torch::stable::Tensor&) { return {nullptr, nullptr, cuda_on_host::device.multiprocessors}; }

}  // namespace pyspec
