// Programmatic dependent launch: a kernel is set up on the GPU while the one before it still runs.
//
// Every kernel calls wait_for_inputs before it touches memory, and lets the next one be set up from then on.
// So when a kernel passes its wait, all that were launched before it are over, and no memory is read or
// written too early. Before Hopper there is none of this.
#pragma once

#include <cuda_runtime.h>

namespace pyspec {
namespace {

// Every thread comes here first.
__device__ inline void wait_for_inputs() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

#ifdef __CUDA_ARCH_LIST__
// Whether the current device runs code that waits: one generation of those this was compiled for is Hopper or
// later, and not later than the device.
inline bool overlaps() {
  int device = 0, major = 0, minor = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
  for (int architecture : {__CUDA_ARCH_LIST__}) {
    if (900 <= architecture && architecture <= 100 * major + 10 * minor) return true;
  }
  return false;
}
#endif

// What a launch needs besides its arguments.
struct Launch {
  dim3 grid;
  unsigned threads;
  int64_t shared;  // bytes of dynamic shared memory
  cudaStream_t stream;
};

template <class... Expected, class... Given>
cudaError_t launch(const Launch& what, void (*kernel)(Expected...), const Given&... given) {
  cudaLaunchConfig_t config{};
  config.gridDim = what.grid;
  config.blockDim = dim3(what.threads);
  config.dynamicSmemBytes = static_cast<size_t>(what.shared);
  config.stream = what.stream;
#ifdef __CUDA_ARCH_LIST__
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  config.attrs = &attribute;
  config.numAttrs = overlaps() ? 1 : 0;
#endif
  return cudaLaunchKernelEx(&config, kernel, given...);
}

}  // namespace
}  // namespace pyspec
