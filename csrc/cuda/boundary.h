// What every CUDA binding needs: the GPU of a tensor and its stream, and errors of the runtime as exceptions.
#pragma once

#include <cuda_runtime.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <memory>

#include "../element.h"

// Registers bindings for CUDA tensors. tests/cuda_on_host has its own, for the kernels that it runs on the
// CPU.
#ifndef PYSPEC_CUDA_LIBRARY
#define PYSPEC_CUDA_LIBRARY(m) STABLE_TORCH_LIBRARY_IMPL(pyspec, CUDA, m)
#endif

namespace pyspec {

struct Gpu {
  std::shared_ptr<void> current;  // makes it the current device while this lives
  cudaStream_t stream;            // torch's current one
  int64_t multiprocessors;
};

// The GPU that a tensor is on.
Gpu gpu_of(const torch::stable::Tensor& tensor);

inline void check(cudaError_t error, const char* what) {
  STD_TORCH_CHECK(error == cudaSuccess, what, ": ", cudaGetErrorString(error));
}

// An uninitialised tensor [rows, columns] on the device of `beside`, without a look-up of aten::new_empty by
// its name.
inline torch::stable::Tensor empty(const torch::stable::Tensor& beside, int64_t rows, int64_t columns,
                                   torch::headeronly::ScalarType type) {
  const int64_t sizes[] = {rows, columns}, strides[] = {columns, 1};
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)), device_type, device;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_type(beside.get(), &device_type));
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_device_index(beside.get(), &device));
  AtenTensorHandle handle;
  TORCH_ERROR_CODE_CHECK(aoti_torch_empty_strided(2, sizes, strides, dtype, device_type, device, &handle));
  return torch::stable::Tensor(handle);
}

}  // namespace pyspec
