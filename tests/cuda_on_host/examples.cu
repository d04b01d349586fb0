// Kernels that use what cuda_on_host.h implements, right and wrong, for its own tests. Real CUDA: nvcc
// compiles them too.
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include <cstdint>

extern __shared__ uint4 dynamic_shared[];

namespace {

constexpr unsigned kAll = 0xffffffffu;

// ---- a sum per block, in dynamic shared memory

__global__ void block_sums(const int* x, int* sums, int n) {
  int* partial = reinterpret_cast<int*>(dynamic_shared);
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  partial[threadIdx.x] = i < n ? x[i] : 0;
  for (unsigned half = blockDim.x / 2; half; half /= 2) {
    __syncthreads();
    if (threadIdx.x < half) partial[threadIdx.x] += partial[threadIdx.x + half];
  }
  if (threadIdx.x == 0) sums[blockIdx.x] = partial[0];
}

// ---- an inclusive scan: shuffles in a warp, then the warps' totals in static shared memory

__device__ int warp_scan(int value) {
  int lane = threadIdx.x % 32;
  for (int by = 1; by < 32; by *= 2) {
    int before = __shfl_up_sync(kAll, value, by);
    if (lane >= by) value += before;
  }
  return value;
}

__global__ void scan(const int* x, int* out) {
  __shared__ int totals[32];
  int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  int value = warp_scan(x[threadIdx.x]);
  if (lane == 31) totals[warp] = value;
  __syncthreads();
  if (warp == 0) totals[lane] = warp_scan(lane < static_cast<int>(blockDim.x / 32) ? totals[lane] : 0);
  __syncthreads();
  out[threadIdx.x] = value + (warp ? totals[warp - 1] : 0);
}

// ---- every warp operation, one column of out [columns, 32] each

__global__ void warp_operations(const int* x, int* out) {
  int lane = threadIdx.x, value = x[lane], column = 0;
  auto put = [&](int result) { out[32 * column++ + lane] = result; };
  put(__shfl_sync(kAll, value, 31 - lane));
  put(__shfl_sync(kAll, value, 3, 8));
  put(__shfl_up_sync(kAll, value, 2, 16));
  put(__shfl_down_sync(kAll, value, 5));
  put(__shfl_xor_sync(kAll, value, 16));
  put(static_cast<int>(__ballot_sync(kAll, value > 0)));
  put(__any_sync(kAll, value == x[7]));
  put(__all_sync(kAll, value == x[7]));
  put(static_cast<int>(__match_any_sync(kAll, value & 3)));
  put(__reduce_max_sync(kAll, value));
  // The two halves of a warp may go different ways.
  if (lane < 16) {
    put(__shfl_xor_sync(0x0000ffffu, value, 1));
  } else {
    put(static_cast<int>(__ballot_sync(0xffff0000u, value > 0)));
  }
  __syncwarp();
  put(static_cast<int>(__shfl_sync(kAll, 1ull << 40 | static_cast<unsigned long long>(lane), 9) >> 8));
}

// ---- the last block to finish adds up what the others left

__global__ void last_block_sum(const int* x, int* partial, unsigned* finished, int* sum) {
  __shared__ bool is_last;
  int* mine = reinterpret_cast<int*>(dynamic_shared);
  if (threadIdx.x == 0) *mine = 0;
  __syncthreads();
  atomicAdd(mine, x[blockIdx.x * blockDim.x + threadIdx.x]);
  __syncthreads();
  if (threadIdx.x == 0) {
    partial[blockIdx.x] = *mine;
    __threadfence();
    is_last = atomicInc(finished, gridDim.x - 1) == gridDim.x - 1;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  for (unsigned i = threadIdx.x; i < gridDim.x; i += blockDim.x) atomicAdd(sum, partial[i]);
}

// ---- the first warp waits for the last, with nothing but a flag between them

__global__ void wait_for_flag(int* out) {
  __shared__ unsigned flag;
  if (threadIdx.x == 0) flag = 0;
  __syncthreads();
  if (threadIdx.x == blockDim.x - 1) {
    out[0] = 7;
    __threadfence_block();
    atomicExch(&flag, 1u);
  }
  if (threadIdx.x == 0) {
    while (!atomicAdd(&flag, 0u)) __nanosleep(20);
    __threadfence_block();
    out[1] = out[0] + 1;
  }
}

// ---- half and bfloat16

__global__ void to_float(const __half* x, const __nv_bfloat16* y, float* out, __half* x_again,
                         __nv_bfloat16* y_again) {
  int i = blockIdx.x * blockDim.x + threadIdx.x;
  out[2 * i] = __half2float(x[i]);
  out[2 * i + 1] = __bfloat162float(y[i]);
  x_again[i] = __float2half(out[2 * i]);
  y_again[i] = __float2bfloat16(out[2 * i + 1]);
}

// ---- mistakes, which the host finds and a GPU may not

__global__ void mistake(int which, int* out) {
  __shared__ int box[64];
  int thread = threadIdx.x;
  if (which == 0 && thread != 5) __syncthreads();  // one thread does not come
  if (which == 1) {
    if (thread < 32) {
      __syncthreads();
    } else {
      __syncthreads();  // two barriers taken for one
    }
  }
  if (which == 2 && thread != 3) __syncwarp();  // names a lane that does not come
  if (which == 3 && thread < 16) out[thread] = __shfl_sync(0x0000ffffu, thread, 20);  // from outside the mask
  if (which == 4) reinterpret_cast<int*>(dynamic_shared)[64 + thread] = 1;       // 256 bytes were asked for
  if (which == 5) out[thread] = reinterpret_cast<int*>(dynamic_shared)[thread];  // nobody wrote it
  if (which == 7 && thread == 9) out[int64_t{1} << 44] = 1;                      // no such memory
  if (which == 6) {  // no barrier between the write and the read
    box[thread] = thread;
    out[thread] = box[63 - thread];
  }
  if (which == 8) box[0] = thread;  // two threads write different values
  if (which == 9) {                 // a shuffle orders nothing
    box[thread] = thread;
    out[thread] = __shfl_xor_sync(0xffffffffu, thread, 1) + box[thread ^ 1];
  }
  if (which == 10) {  // only one of the two is atomic
    if (thread < 32) atomicAdd(&box[0], 1);
    if (thread >= 32) out[thread] = box[0];
  }
  if (which == 11)
    *reinterpret_cast<int*>(reinterpret_cast<char*>(box) + 2) = thread;  // not at a multiple of 4
  if (which == 12) out[thread] = static_cast<int>(3e9f + thread);        // more than an int holds
}

// ---- what looks like a race and is none

__global__ void no_race(int* out) {
  __shared__ int box[64], flag, count;
  int thread = threadIdx.x, of_warp = thread / 32 * 32;
  flag = 1;  // all write the same
  box[thread] = thread;
  __syncwarp();
  int neighbour = box[of_warp + (thread + 1) % 32];
  __syncwarp();
  box[of_warp + (thread + 5) % 32] = neighbour;
  if (thread == 0) count = 0;
  __syncthreads();
  atomicAdd(&count, box[63 - thread]);
  atomicMax(&count, flag);
  __syncthreads();
  if (thread < 16) {  // half a warp meets by itself
    box[thread] = thread;
    __syncwarp(0xffffu);
    box[15 - thread] += count;
  }
  __syncthreads();
  out[thread] = box[thread];
}

template <class... Parameters, class... Arguments>
int launch(void (*kernel)(Parameters...), int blocks, int threads, size_t shared, Arguments... arguments) {
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(blocks), config.blockDim = dim3(threads), config.dynamicSmemBytes = shared;
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

}  // namespace

extern "C" {

int example_block_sums(const int* x, int* sums, int n, int blocks, int threads) {
  return launch(block_sums, blocks, threads, threads * sizeof(int), x, sums, n);
}
int example_scan(const int* x, int* out, int threads) { return launch(scan, 1, threads, 0, x, out); }
int example_warp_operations(const int* x, int* out) { return launch(warp_operations, 1, 32, 0, x, out); }
int example_last_block_sum(const int* x, int* partial, unsigned* finished, int* sum, int blocks,
                           int threads) {
  return launch(last_block_sum, blocks, threads, sizeof(int), x, partial, finished, sum);
}
int example_to_float(const void* x, const void* y, float* out, void* x_again, void* y_again, int blocks) {
  return launch(to_float, blocks, 256, 0, static_cast<const __half*>(x), static_cast<const __nv_bfloat16*>(y),
                out, static_cast<__half*>(x_again), static_cast<__nv_bfloat16*>(y_again));
}
int example_wait_for_flag(int* out) { return launch(wait_for_flag, 1, 128, 0, out); }
int example_no_race(int* out) { return launch(no_race, 1, 64, 0, out); }
int example_mistake(int which, int* out) { return launch(mistake, 1, 64, 256, which, out); }

}  // extern "C"
