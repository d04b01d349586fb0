// CUDA C++ as ordinary C++, for tests: a .cu file compiled with this folder as its include path runs on the
// CPU. README.md says what is there and what is not.
#pragma once

#include <dlfcn.h>

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <map>
#include <memory>
#include <mutex>
#include <numeric>
#include <random>
#include <string>
#include <thread>
#include <tuple>
#include <type_traits>
#include <vector>

#include "fibers.h"
#include "races.h"

#pragma GCC visibility push(hidden)

// ==== words of the language ====

#define __global__
#define __device__
#define __host__
#define __constant__
#define __grid_constant__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __align__(n) alignas(n)
// One copy per thread of the CPU, and a block lives on one of those: shared by the block, and only by it.
#define __shared__ thread_local

// ==== vectors ====

#define CUDA_ON_HOST_VECTORS(T, name)                                                \
  struct alignas(2 * sizeof(T)) name##2 { T x, y; };                                 \
  struct name##3 { T x, y, z; };                                                     \
  struct alignas(4 * sizeof(T) < 16 ? 4 * sizeof(T) : 16) name##4 { T x, y, z, w; }; \
  inline name##2 make_##name##2(T x, T y) { return {x, y}; }                         \
  inline name##3 make_##name##3(T x, T y, T z) { return {x, y, z}; }                 \
  inline name##4 make_##name##4(T x, T y, T z, T w) { return {x, y, z, w}; }

CUDA_ON_HOST_VECTORS(int8_t, char)
CUDA_ON_HOST_VECTORS(uint8_t, uchar)
CUDA_ON_HOST_VECTORS(int16_t, short)
CUDA_ON_HOST_VECTORS(uint16_t, ushort)
CUDA_ON_HOST_VECTORS(int32_t, int)
CUDA_ON_HOST_VECTORS(uint32_t, uint)
CUDA_ON_HOST_VECTORS(long long, longlong)
CUDA_ON_HOST_VECTORS(unsigned long long, ulonglong)
CUDA_ON_HOST_VECTORS(float, float)
CUDA_ON_HOST_VECTORS(double, double)
#undef CUDA_ON_HOST_VECTORS

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline thread_local dim3 threadIdx, blockIdx, blockDim, gridDim;
constexpr int warpSize = 32;

// ==== half and bfloat16 ====

struct __half {
  uint16_t bits;
};
struct __nv_bfloat16 {
  uint16_t bits;
};
using half = __half;
using nv_bfloat16 = __nv_bfloat16;

namespace cuda_on_host {

template <class To, class From>
To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  std::memcpy(&to, &from, sizeof(to));
  return to;
}

}  // namespace cuda_on_host

inline float __half2float(__half x) { return static_cast<float>(cuda_on_host::bit_cast<_Float16>(x.bits)); }
inline __half __float2half(float x) { return {cuda_on_host::bit_cast<uint16_t>(static_cast<_Float16>(x))}; }
inline __half __float2half_rn(float x) { return __float2half(x); }
inline unsigned short __half_as_ushort(__half x) { return x.bits; }
inline __half __ushort_as_half(unsigned short x) { return {x}; }

inline float __bfloat162float(__nv_bfloat16 x) {
  return cuda_on_host::bit_cast<float>(uint32_t{x.bits} << 16);
}
inline __nv_bfloat16 __float2bfloat16(float x) {
  uint32_t bits = cuda_on_host::bit_cast<uint32_t>(x);
  if (x != x) return {0x7fff};
  return {static_cast<uint16_t>((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}
inline __nv_bfloat16 __float2bfloat16_rn(float x) { return __float2bfloat16(x); }
inline unsigned short __bfloat16_as_ushort(__nv_bfloat16 x) { return x.bits; }
inline __nv_bfloat16 __ushort_as_bfloat16(unsigned short x) { return {x}; }

// ==== arithmetic ====

template <class A, class B>
auto min(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(b) < static_cast<T>(a) ? static_cast<T>(b) : static_cast<T>(a);
}
template <class A, class B>
auto max(A a, B b) {
  using T = std::common_type_t<A, B>;
  return static_cast<T>(a) < static_cast<T>(b) ? static_cast<T>(b) : static_cast<T>(a);
}

inline unsigned __float_as_uint(float x) { return cuda_on_host::bit_cast<unsigned>(x); }
inline int __float_as_int(float x) { return cuda_on_host::bit_cast<int>(x); }
inline float __uint_as_float(unsigned x) { return cuda_on_host::bit_cast<float>(x); }
inline float __int_as_float(int x) { return cuda_on_host::bit_cast<float>(x); }
inline int __popc(unsigned x) { return __builtin_popcount(x); }
inline int __popcll(unsigned long long x) { return __builtin_popcountll(x); }
inline int __clz(int x) { return x ? __builtin_clz(x) : 32; }
inline int __clzll(long long x) { return x ? __builtin_clzll(x) : 64; }
inline int __ffs(int x) { return __builtin_ffs(x); }
inline int __ffsll(long long x) { return __builtin_ffsll(x); }
inline unsigned __byte_perm(unsigned x, unsigned y, unsigned selector) {
  uint64_t bytes = uint64_t{y} << 32 | x;
  unsigned result = 0;
  for (int i = 0; i < 4; ++i) result |= static_cast<uint8_t>(bytes >> (selector >> 4 * i & 7) * 8) << 8 * i;
  return result;
}
inline float __fmaf_rn(float a, float b, float c) { return std::fma(a, b, c); }
inline float __fadd_rn(float a, float b) { return a + b; }
inline float __fmul_rn(float a, float b) { return a * b; }
inline float __expf(float x) { return std::exp(x); }
inline float __logf(float x) { return std::log(x); }
inline float __fdividef(float a, float b) { return a / b; }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
template <class T>
T __ldg(const T* p) {
  return *p;
}

// ==== waiting for the other threads ====

namespace cuda_on_host {

template <class T>
uint64_t to_bits(T value) {
  static_assert(sizeof(T) <= 8 && std::is_trivially_copyable_v<T>, "shuffles move at most 8 bytes");
  uint64_t bits = 0;
  std::memcpy(&bits, &value, sizeof(T));
  return bits;
}

template <class T>
T from_bits(uint64_t bits) {
  T value;
  std::memcpy(&value, &bits, sizeof(T));
  return value;
}

// What lane `source` offers, or the caller's own value where source is outside its segment [first, end).
template <class T>
T shuffle(uint32_t mask, T value, int source, int first, int end, Site site) {
  Block& block = Block::current();
  if (source < first || source >= end) source = block.lane();
  if (!(mask >> source & 1)) block.fail(std::string(site.what) + " asks a lane that is not in the mask");
  auto from_source = [](const Fiber* lanes, int i) { return lanes[lanes[i].source].offer; };
  return from_bits<T>(block.meet(mask, to_bits(value), source, site, from_source));
}

inline int segment(int width) { return Block::current().lane() / width * width; }

// Bit i of the result: whether lane i of the mask offered something other than 0.
inline unsigned ballot(uint32_t mask, bool vote, Site site) {
  auto gather = [](const Fiber* lanes, int self) {
    uint64_t votes = 0;
    for (int i = 0; i < kWarp; ++i) {
      if (lanes[self].mask >> i & 1 && lanes[i].offer) votes |= uint64_t{1} << i;
    }
    return votes;
  };
  return static_cast<unsigned>(Block::current().meet(mask, vote, 0, site, gather));
}

// combine(a, b) over the lanes of the mask.
template <class T, class Combine>
T reduce(uint32_t mask, T value, Site site, Combine combine) {
  auto fold = [&](const Fiber* lanes, int self) {
    T result{};
    bool is_first = true;
    for (int i = 0; i < kWarp; ++i) {
      if (!(lanes[self].mask >> i & 1)) continue;
      T offer = from_bits<T>(lanes[i].offer);
      result = is_first ? offer : combine(result, offer);
      is_first = false;
    }
    return to_bits(result);
  };
  return from_bits<T>(Block::current().meet(mask, to_bits(value), 0, site, fold));
}

}  // namespace cuda_on_host

using CudaSite = cuda_on_host::Site;

inline void __syncthreads(CudaSite site = CudaSite::at("__syncthreads")) {
  cuda_on_host::Block::current().barrier(0, site);
}
inline int __syncthreads_count(int vote, CudaSite site = CudaSite::at("__syncthreads_count")) {
  return static_cast<int>(cuda_on_host::Block::current().barrier(vote != 0, site));
}
inline int __syncthreads_or(int vote, CudaSite site = CudaSite::at("__syncthreads_or")) {
  return cuda_on_host::Block::current().barrier(vote != 0, site) != 0;
}
inline int __syncthreads_and(int vote, CudaSite site = CudaSite::at("__syncthreads_and")) {
  return cuda_on_host::Block::current().barrier(vote == 0, site) == 0;
}
inline void __syncwarp(unsigned mask = 0xffffffffu, CudaSite site = CudaSite::at("__syncwarp")) {
  int thread = cuda_on_host::Block::current().thread();
  cuda_on_host::Races::of_this_thread().enter_warp(thread);
  cuda_on_host::ballot(mask, false, site);
  cuda_on_host::Races::of_this_thread().leave_warp(thread, mask);
}

inline unsigned __ballot_sync(unsigned mask, int vote, CudaSite site = CudaSite::at("__ballot_sync")) {
  return cuda_on_host::ballot(mask, vote != 0, site);
}
inline int __any_sync(unsigned mask, int vote, CudaSite site = CudaSite::at("__any_sync")) {
  return cuda_on_host::ballot(mask, vote != 0, site) != 0;
}
inline int __all_sync(unsigned mask, int vote, CudaSite site = CudaSite::at("__all_sync")) {
  return cuda_on_host::ballot(mask, vote != 0, site) == mask;
}
inline unsigned __activemask() = delete;  // which lanes happen to run together is not a program's business

template <class T>
T __shfl_sync(unsigned mask, T value, int lane, int width = 32, CudaSite site = CudaSite::at("__shfl_sync")) {
  int first = cuda_on_host::segment(width);
  return cuda_on_host::shuffle(mask, value, first + (lane & (width - 1)), first, first + width, site);
}
template <class T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32,
                 CudaSite site = CudaSite::at("__shfl_up_sync")) {
  int lane = cuda_on_host::Block::current().lane(), first = cuda_on_host::segment(width);
  return cuda_on_host::shuffle(mask, value, lane - static_cast<int>(by), first, first + width, site);
}
template <class T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32,
                   CudaSite site = CudaSite::at("__shfl_down_sync")) {
  int lane = cuda_on_host::Block::current().lane(), first = cuda_on_host::segment(width);
  return cuda_on_host::shuffle(mask, value, lane + static_cast<int>(by), first, first + width, site);
}
// As on the GPU, a lane may ask one of an earlier segment, not one of a later.
template <class T>
T __shfl_xor_sync(unsigned mask, T value, int with, int width = 32,
                  CudaSite site = CudaSite::at("__shfl_xor_sync")) {
  int lane = cuda_on_host::Block::current().lane();
  return cuda_on_host::shuffle(mask, value, lane ^ with, 0, cuda_on_host::segment(width) + width, site);
}

template <class T>
unsigned __match_any_sync(unsigned mask, T value, CudaSite site = CudaSite::at("__match_any_sync")) {
  auto equals = [](const cuda_on_host::Fiber* lanes, int self) {
    uint64_t found = 0;
    for (int i = 0; i < warpSize; ++i) {
      if (lanes[self].mask >> i & 1 && lanes[i].offer == lanes[self].offer) found |= uint64_t{1} << i;
    }
    return found;
  };
  uint64_t bits = cuda_on_host::to_bits(value);
  return static_cast<unsigned>(cuda_on_host::Block::current().meet(mask, bits, 0, site, equals));
}
template <class T>
T __reduce_add_sync(unsigned mask, T value, CudaSite site = CudaSite::at("__reduce_add_sync")) {
  return cuda_on_host::reduce(mask, value, site, [](T a, T b) { return a + b; });
}
template <class T>
T __reduce_max_sync(unsigned mask, T value, CudaSite site = CudaSite::at("__reduce_max_sync")) {
  return cuda_on_host::reduce(mask, value, site, [](T a, T b) { return a < b ? b : a; });
}
template <class T>
T __reduce_min_sync(unsigned mask, T value, CudaSite site = CudaSite::at("__reduce_min_sync")) {
  return cuda_on_host::reduce(mask, value, site, [](T a, T b) { return b < a ? b : a; });
}

inline void __nanosleep(unsigned) { cuda_on_host::Block::current().yield(); }
inline void __threadfence() { __atomic_thread_fence(__ATOMIC_SEQ_CST); }
inline void __threadfence_block() { __threadfence(); }

// ==== atomics ====

template <class T, class V>
T atomicExch(T* p, V value) {
  T old;
  T desired = static_cast<T>(value);
  __atomic_exchange(p, &desired, &old, __ATOMIC_RELAXED);
  return old;
}
template <class T, class A, class B>
T atomicCAS(T* p, A expected, B desired) {
  T old = static_cast<T>(expected);
  __atomic_compare_exchange_n(p, &old, static_cast<T>(desired), false, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
  return old;
}

namespace cuda_on_host {

template <class T, class Change>
T change(T* p, Change next) {
  T old, desired;
  __atomic_load(p, &old, __ATOMIC_RELAXED);
  do {
    desired = next(old);
  } while (!__atomic_compare_exchange(p, &old, &desired, true, __ATOMIC_RELAXED, __ATOMIC_RELAXED));
  return old;
}

}  // namespace cuda_on_host

#define CUDA_ON_HOST_ATOMIC(name, result)                                          \
  template <class T, class V>                                                      \
  T name(T* p, V given) {                                                          \
    T value = static_cast<T>(given);                                               \
    return cuda_on_host::change(p, [&](T old) { return static_cast<T>(result); }); \
  }
CUDA_ON_HOST_ATOMIC(atomicAdd, old + value)
CUDA_ON_HOST_ATOMIC(atomicSub, old - value)
CUDA_ON_HOST_ATOMIC(atomicMax, old < value ? value : old)
CUDA_ON_HOST_ATOMIC(atomicMin, value < old ? value : old)
CUDA_ON_HOST_ATOMIC(atomicOr, old | value)
CUDA_ON_HOST_ATOMIC(atomicAnd, old& value)
CUDA_ON_HOST_ATOMIC(atomicXor, old ^ value)
CUDA_ON_HOST_ATOMIC(atomicInc, old >= value ? 0 : old + 1)
#undef CUDA_ON_HOST_ATOMIC

// ==== the runtime: one device, launches that are done when they return ====

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

#pragma GCC visibility pop

// ==== for the tests that load the library ====

#define CUDA_ON_HOST_EXPORT extern "C" __attribute__((visibility("default"), used)) inline

CUDA_ON_HOST_EXPORT void cuda_on_host_set(int multiprocessors, int blocks_in_flight, int shared,
                                          uint64_t seed) {
  cuda_on_host::device.multiprocessors = multiprocessors;
  cuda_on_host::device.blocks_in_flight = blocks_in_flight;
  cuda_on_host::device.shared = shared;
  cuda_on_host::device.seed = seed;
}
// From now on launches are noted and nothing runs, or the other way round; returns what was noted before.
CUDA_ON_HOST_EXPORT const char* cuda_on_host_note(int only_notes) {
  static std::string before;
  before = std::exchange(cuda_on_host::device.launches, "");
  cuda_on_host::device.only_notes = only_notes;
  return before.c_str();
}
CUDA_ON_HOST_EXPORT const char* cuda_on_host_error() { return cuda_on_host::device.error.c_str(); }
