// The CUDA runtime for tests, a part of cuda_on_host.h: one device, launches that are done when they return.
#pragma once

enum cudaError_t {
  cudaSuccess = 0,
  cudaErrorInvalidValue = 1,
  cudaErrorInvalidConfiguration = 9,
  cudaErrorLaunchFailure = 719
};
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount = 16, cudaDevAttrMaxSharedMemoryPerBlockOptin = 97 };
enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize = 8 };
struct __attribute__((visibility("default"))) CUstream_st;
using cudaStream_t = CUstream_st*;

struct cudaLaunchAttribute;
struct cudaLaunchConfig_t {
  dim3 gridDim, blockDim;
  size_t dynamicSmemBytes = 0;
  cudaStream_t stream = nullptr;
  cudaLaunchAttribute* attrs = nullptr;
  unsigned numAttrs = 0;
};

namespace cuda_on_host {

constexpr size_t kMostShared = 227 << 10;    // bytes a block may ask for on the largest GPU
constexpr size_t kUnaskedShared = 48 << 10;  // and without cudaFuncSetAttribute
constexpr size_t kGuard = 4 << 10;           // bytes behind what was asked for that must stay as they are
constexpr uint8_t kPoison = 0xa7;            // fills shared memory before a block, which owes it to nobody

struct Device {
  int multiprocessors = 4;
  int blocks_in_flight = 1;  // on threads of the CPU; they write over each other as they do on a GPU
  int shared = 99 << 10;     // bytes a block may ask for, as on the smallest GPU since Ampere
  uint64_t seed = 0;         // 0: blocks and threads in ascending order; else in one drawn from it
  bool only_notes = false;   // launches: in `launches`, a line each, and nothing runs
  std::string launches;
  std::string error;  // of the last launch that failed
  std::mutex mutex;
  std::map<const void*, size_t> shared_limits;
};
inline Device device;

}  // namespace cuda_on_host

// A kernel's dynamic shared memory has this name and type, declared outside every namespace.
extern __shared__ uint4 dynamic_shared[];
inline thread_local uint4 dynamic_shared[(cuda_on_host::kMostShared + cuda_on_host::kGuard) / sizeof(uint4)];

namespace cuda_on_host {

inline Block& block_of_this_thread() {
  static thread_local auto block = std::make_unique<Block>();  // beside shared memory, not in it
  return *block;
}

// Takes blocks until none is left or one has failed.
inline void run_blocks(const cudaLaunchConfig_t& config, const std::vector<unsigned>& order,
                       const std::function<void()>& body, std::atomic<size_t>& taken) {
  const dim3 &grid = config.gridDim, &size = config.blockDim;
  FaultStack stack;
  auto* shared = reinterpret_cast<uint8_t*>(dynamic_shared);
  blockDim = size, gridDim = grid;
  for (size_t i; (i = taken.fetch_add(1)) < order.size();) {
    unsigned index = order[i];
    blockIdx = dim3(index % grid.x, index / grid.x % grid.y, index / grid.x / grid.y);
    std::memset(shared, kPoison, config.dynamicSmemBytes + kGuard);
    auto enter = [&](int thread) {
      unsigned t = thread;
      threadIdx = dim3(t % size.x, t / size.x % size.y, t / size.x / size.y);
    };
    Races::of_this_thread().start(shared, config.dynamicSmemBytes);
    uint64_t seed = device.seed ? device.seed + index : 0;
    std::string error = block_of_this_thread().run(size.x * size.y * size.z, seed, body, enter);
    if (error.empty()) error = Races::of_this_thread().finish();
    const uint8_t* guard = shared + config.dynamicSmemBytes;
    bool is_whole = std::all_of(guard, guard + kGuard, [](uint8_t byte) { return byte == kPoison; });
    if (error.empty() && !is_whole) error = "wrote behind its dynamic shared memory";
    if (error.empty()) continue;
    taken = order.size();
    std::lock_guard<std::mutex> lock(device.mutex);
    device.error = "block (" + std::to_string(blockIdx.x) + ", " + std::to_string(blockIdx.y) + ", " +
                   std::to_string(blockIdx.z) + "): " + error;
  }
}

inline cudaError_t launch(const cudaLaunchConfig_t& config, const void* kernel,
                          const std::function<void()>& body) {
  const dim3 &grid = config.gridDim, &block = config.blockDim;
  auto refuse = [](cudaError_t code, std::string text) {
    device.error = std::move(text);
    return code;
  };
  if (!grid.x || !grid.y || !grid.z || grid.x > 0x7fffffffu || grid.y > 65535 || grid.z > 65535) {
    return refuse(cudaErrorInvalidConfiguration, "the grid is empty or too large");
  }
  if (!block.x || !block.y || !block.z || uint64_t{block.x} * block.y * block.z > 1024) {
    return refuse(cudaErrorInvalidConfiguration, "a block has 1 to 1024 threads");
  }
  auto limit = device.shared_limits.find(kernel);
  if (config.dynamicSmemBytes > (limit == device.shared_limits.end() ? kUnaskedShared : limit->second)) {
    return refuse(cudaErrorInvalidValue, "more dynamic shared memory than cudaFuncSetAttribute allowed");
  }
  device.error.clear();
  if (device.only_notes) {
    Dl_info library;  // a kernel has no name here: its place in the library has one there
    dladdr(&device, &library);
    auto place = reinterpret_cast<uintptr_t>(kernel) - reinterpret_cast<uintptr_t>(library.dli_fbase);
    for (uint64_t number : {uint64_t{place}, uint64_t{grid.x}, uint64_t{grid.y}, uint64_t{grid.z},
                            uint64_t{block.x} * block.y * block.z, uint64_t{config.dynamicSmemBytes}}) {
      device.launches += std::to_string(number) + " ";
    }
    device.launches += "\n";
    return cudaSuccess;
  }
  std::vector<unsigned> order(size_t{grid.x} * grid.y * grid.z);
  std::iota(order.begin(), order.end(), 0u);
  if (device.seed) std::shuffle(order.begin(), order.end(), std::minstd_rand(device.seed));
  std::atomic<size_t> taken{0};
  FaultHandler handler;
  std::vector<std::thread> others;
  for (int i = 1; i < device.blocks_in_flight; ++i) {
    others.emplace_back([&] { run_blocks(config, order, body, taken); });
  }
  run_blocks(config, order, body, taken);
  for (std::thread& other : others) other.join();
  return device.error.empty() ? cudaSuccess : cudaErrorLaunchFailure;
}

}  // namespace cuda_on_host

template <class... Expected, class... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t* config, void (*kernel)(Expected...),
                               Given&&... given) {
  std::tuple<Expected...> arguments(std::forward<Given>(given)...);
  auto body = [&] { std::apply(kernel, arguments); };
  return cuda_on_host::launch(*config, reinterpret_cast<const void*>(kernel), body);
}

template <class Kernel>
cudaError_t cudaFuncSetAttribute(Kernel* kernel, cudaFuncAttribute, int bytes) {
  if (bytes < 0 || bytes > cuda_on_host::device.shared) return cudaErrorInvalidValue;
  cuda_on_host::device.shared_limits[reinterpret_cast<const void*>(kernel)] = bytes;
  return cudaSuccess;
}

inline cudaError_t cudaGetDevice(int* index) {
  *index = 0;
  return cudaSuccess;
}
inline cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  bool is_count = attribute == cudaDevAttrMultiProcessorCount;
  *value = is_count ? cuda_on_host::device.multiprocessors : cuda_on_host::device.shared;
  return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void* p, int value, size_t bytes, cudaStream_t = nullptr) {
  std::memset(p, value, bytes);
  return cudaSuccess;
}
inline const char* cudaGetErrorString(cudaError_t error) {
  return error == cudaSuccess ? "no error" : cuda_on_host::device.error.c_str();
}
