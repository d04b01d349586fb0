#include "boundary.h"

#include <torch/csrc/stable/accelerator.h>

// Only a torch with CUDA has it; weak, so that the library also loads beside one without.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device,
                                                                                   void** stream);

namespace pyspec {

Gpu gpu_of(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream, "this torch has no CUDA");
  int32_t device = tensor.get_device_index();
  Gpu gpu{std::make_shared<torch::stable::accelerator::DeviceGuard>(device), nullptr, 0};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(device, &stream));
  gpu.stream = static_cast<cudaStream_t>(stream);
  int multiprocessors = 0;
  check(cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device), "multiprocessors");
  gpu.multiprocessors = multiprocessors;
  return gpu;
}

}  // namespace pyspec

// For pyspec info.
extern "C" __attribute__((visibility("default"))) const char* pyspec_cuda_architectures() {
  return PYSPEC_CUDA_ARCHITECTURES;
}
