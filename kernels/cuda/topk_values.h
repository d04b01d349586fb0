// The values of a row of topk as numbers, larger where they are better.
//
//   number = key << 32 | (n - 1 - index)      key: the bits of a float, ordered as TopkParams says
//
// No two numbers of a row are equal, so ties, NaN and signed zeros need no thought from here on, and nothing
// depends on which thread came first. 0 is no value at all.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

#include "params/topk.h"

namespace pyspec {
namespace {

// As a float, in which -0 is +0 and every NaN the same one, above infinity.
__device__ float canonical(float x) {
#ifdef __CUDA_ARCH__
  return x + 0.0f;
#else
  return x == x ? x + 0.0f : __uint_as_float(0x7fffffffu);
#endif
}

// What x may be of. kKeyLow: bits of a float that values of this type do not have.
struct Float32 {
  using Bits = uint32_t;
  static constexpr int kKeyLow = 0;
  __device__ static float to_float(uint32_t bits) { return __uint_as_float(bits); }
  __device__ static Bits of_float(uint32_t bits) { return bits; }
};
struct Float16 {
  using Bits = uint16_t;
  static constexpr int kKeyLow = 13;
  __device__ static float to_float(uint32_t bits) {
    return __half2float(__ushort_as_half(static_cast<uint16_t>(bits)));
  }
  __device__ static Bits of_float(uint32_t bits) {
    return __half_as_ushort(__float2half_rn(__uint_as_float(bits)));
  }
};
struct BFloat16 {
  using Bits = uint16_t;
  static constexpr int kKeyLow = 16;
  __device__ static float to_float(uint32_t bits) { return __uint_as_float(bits << 16); }
  __device__ static Bits of_float(uint32_t bits) { return static_cast<Bits>(bits >> 16); }
};

// Neighbours that are loaded at once, as they lie in memory.
template <int kBytes>
struct alignas(kBytes) Words {
  uint32_t words[kBytes / 4];
};

// values[to] = x[from], bit for bit, of a value with this number: only zeros, of which there are two, and
// NaN, of which there are many, have to be read again.
template <class T>
__device__ void copy_value(const TopkParams& p, uint64_t number, int64_t from, int64_t to) {
  using Bits = typename T::Bits;
  uint32_t ordered = static_cast<uint32_t>(number >> 32) ^ (p.largest ? 0 : ~0u);
  uint32_t bits = (ordered >> 31 ? ordered ^ 1u << 31 : ~ordered) & ~0u << T::kKeyLow;
  bool is_told = bits != 0 && (bits & 0x7fffffffu) <= 0x7f800000u;
  static_cast<Bits*>(p.values)[to] = is_told ? T::of_float(bits) : static_cast<const Bits*>(p.x)[from];
}

template <class T>
struct Row {
  using Bits = typename T::Bits;
  const Bits* x;
  uint32_t n, flip;

  // Larger for a better value, never 0.
  __device__ uint32_t key(uint32_t value) const {
    int32_t bits = __float_as_int(canonical(T::to_float(value)));
    uint32_t ordered = bits ^ (bits >> 31 | 1 << 31);
    return max((ordered ^ flip) & ~0u << T::kKeyLow, 1u << T::kKeyLow);
  }
  __device__ uint64_t number(uint32_t key, uint32_t index) const {
    return static_cast<uint64_t>(key) << 32 | (n - 1 - index);
  }
  __device__ uint64_t number_at(uint32_t index) const { return number(key(x[index]), index); }

  // How many values lie between the row's first and the last address before it that kSize of them fit.
  template <int kSize>
  __device__ uint32_t lead() const {
    return static_cast<uint32_t>(reinterpret_cast<uintptr_t>(x) / sizeof(Bits) % kSize);
  }
  // kSize values; their key is that of key_of.
  template <int kSize>
  __device__ auto load(uint32_t first) const {
    constexpr int kBytes = kSize * static_cast<int>(sizeof(Bits));
    if constexpr (kSize == 1) {
      return Words<4>{{x[first]}};
    } else {
      return *reinterpret_cast<const Words<kBytes>*>(x + first);
    }
  }
  template <int kBytes>
  __device__ uint32_t key_of(const Words<kBytes>& loaded, int i) const {
    if (sizeof(Bits) == 4) return key(loaded.words[i]);
    return key(loaded.words[i / 2] >> 16 * (i % 2) & 0xffff);
  }
};

}  // namespace
}  // namespace pyspec
