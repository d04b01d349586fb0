#include "boundary.h"

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

namespace pyspec {
namespace {

// aoti_torch_get_current_cuda_stream, or null beside a torch without CUDA. Looked up, so that one library
// loads beside either and finds it whatever torch it was linked with; by the name of its library too, because
// Python loads torch with local symbols.
auto* current_stream() {
  using Function = AOTITorchError (*)(int32_t device, void** stream);
  static const Function found = [] {
    const char* name = "aoti_torch_get_current_cuda_stream";
    void* function = dlsym(RTLD_DEFAULT, name);
    void* torch_cuda = function ? nullptr : dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return reinterpret_cast<Function>(torch_cuda ? dlsym(torch_cuda, name) : function);
  }();
  return found;
}

}  // namespace

Gpu gpu_of(const torch::stable::Tensor& tensor) {
  STD_TORCH_CHECK(current_stream(), "this torch has no CUDA");
  int32_t device = tensor.get_device_index();
  Gpu gpu{std::make_shared<torch::stable::accelerator::DeviceGuard>(device), nullptr, 0};
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(current_stream()(device, &stream));
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
