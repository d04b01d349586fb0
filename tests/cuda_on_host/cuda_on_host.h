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

#include "runtime.h"

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
