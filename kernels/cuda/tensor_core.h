// The instructions that CUDA C++ has no name for: products on tensor cores and copies to shared memory that
// go on by themselves. Off the GPU (tests/cuda_on_host) each is plain C++.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

namespace pyspec {
namespace {

__device__ uint32_t pack_halves(float low, float high) {
#ifdef __CUDA_ARCH__
  uint32_t pair;
  asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(pair) : "f"(high), "f"(low));
  return pair;
#else
  return __half_as_ushort(__float2half_rn(low)) | uint32_t{__half_as_ushort(__float2half_rn(high))} << 16;
#endif
}

__device__ float half_at(uint32_t pair, int which) {
  return __half2float(__ushort_as_half(static_cast<unsigned short>(which ? pair >> 16 : pair)));
}

// sums [16][8] += a [16][16] . b [16][8] of a warp, fp16 to fp32. Lane 4 g + t has rows g and g + 8 of a, for
// k of 2 t, 2 t + 1 (a[0], a[1]) and 2 t + 8, 2 t + 9 (a[2], a[3]); column g of b for the same k (b0, b1);
// and rows g (sums[0], sums[1]) and g + 8 of columns 2 t and 2 t + 1. A column does not depend on the others.
__device__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef __CUDA_ARCH__
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
      "{%0, %1, %2, %3};"
      : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else
  __shared__ uint32_t operands[32][32][6];  // of warps and lanes
  auto& lanes = operands[threadIdx.x / 32];
  int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  for (int i = 0; i < 4; ++i) lanes[lane][i] = a[i];
  lanes[lane][4] = b0, lanes[lane][5] = b1;
  __syncwarp();
  for (int k = 0; k < 16; ++k) {
    int of = k % 8 / 2, upper = k / 8;
    for (int i = 0; i < 4; ++i)
      sums[i] += half_at(lanes[4 * g + of][2 * upper + i / 2], k % 2) *
                 half_at(lanes[4 * (2 * t + i % 2) + of][4 + upper], k % 2);
  }
  __syncwarp();
#endif
}

// Begins to copy 4 or 16 bytes, aligned, to shared memory.
template <int kBytes>
__device__ void copy_later(void* shared, const void* global) {
#ifdef __CUDA_ARCH__
  auto to = static_cast<uint32_t>(__cvta_generic_to_shared(shared));
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], 4;" ::"r"(to), "l"(global) : "memory");
  }
#else
  for (int i = 0; i < kBytes / 4; ++i)
    static_cast<uint32_t*>(shared)[i] = static_cast<const uint32_t*>(global)[i];
#endif
}

// Ends a group of copies; a thread may have several on the way.
__device__ void close_copies() {
#ifdef __CUDA_ARCH__
  asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Waits until at most so many, up to 7, of this thread's groups are on the way, the last ones.
__device__ void await_copies(int left) {
#ifdef __CUDA_ARCH__
  switch (left) {
#define PYSPEC_AWAIT(n)                                       \
  case n:                                                     \
    asm volatile("cp.async.wait_group " #n ";" ::: "memory"); \
    break;
    PYSPEC_AWAIT(0)
    PYSPEC_AWAIT(1)
    PYSPEC_AWAIT(2)
    PYSPEC_AWAIT(3)
    PYSPEC_AWAIT(4)
    PYSPEC_AWAIT(5)
    PYSPEC_AWAIT(6)
    PYSPEC_AWAIT(7)
#undef PYSPEC_AWAIT
  }
#else
  (void)left;
#endif
}

}  // namespace
}  // namespace pyspec
