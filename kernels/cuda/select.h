// The k best of many numbers, selected by one block: 64-bit numbers, all different, larger is better, 0 is
// none. A number is a key, in the high half, and what tells equal keys apart.
//
// Few of them (at_most_bound, sort_best_first): the best key of each thread is known, and the k-th best of
// those is a lower bound, found bit by bit, counting at a barrier. What reaches it is little more than k and
// is sorted.
// Many (find_bound, collect): the k-th largest is found digit by digit of 8 bits, counting in 256 bins (a
// radix select), until all that is left is wanted; what is not below it is collected in the order that it
// came in.
// Every thread of the block calls these functions; a block has whole warps.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>

namespace pyspec {
namespace {

constexpr int kRun = 4;  // numbers a lane reads before it looks at the first
constexpr unsigned kAllLanes = 0xffffffffu;

// In shared memory.
struct SelectScratch {
  uint32_t bins[256];
  uint32_t digit, wanted, in_bin;
  uint32_t found;
  uint32_t totals[2][32];  // of the warps; one for this stretch and one for the next
};

// The bits of a number that differ: those of the key from key_low on, and the index_bits lowest.
struct Digits {
  int key_low, index_bits;

  __device__ int below(int shift) const {  // the place of the next digit
    return shift > key_low ? max(shift - 8, key_low) : max(min(shift, index_bits) - 8, 0);
  }
};

// A key that at least k of the threads' best reach, or 0; little more than k do, if keys differ.
__device__ uint32_t at_most_bound(uint32_t best, uint32_t k) {
  uint32_t bound = 0;
  for (uint32_t bit = 1u << 31; bit; bit /= 2) {
    uint32_t reach = __syncthreads_count(best >= (bound | bit));
    if (reach >= k) bound |= bit;
    if (k <= reach && reach <= k + k / 8) break;
  }
  return bound;
}

__device__ uint32_t warp_scan(uint32_t value) {
  uint32_t lane = threadIdx.x % 32;
  for (uint32_t by = 1; by < 32; by *= 2) {
    uint32_t before = __shfl_up_sync(kAllLanes, value, by);
    if (lane >= by) value += before;
  }
  return value;
}

// item(i) for the kRun places of this lane in the block's stretch that begins at `start`: a warp reads
// neighbours. 0 behind the end.
template <class Item>
__device__ void load_run(Item item, uint32_t start, uint32_t count, uint64_t (&numbers)[kRun]) {
  uint32_t first = start + threadIdx.x / 32 * (32 * kRun) + threadIdx.x % 32;
#pragma unroll
  for (int i = 0; i < kRun; ++i) numbers[i] = first + 32 * i < count ? item(first + 32 * i) : 0;
}

// A bound that exactly k of item(0 ... count - 1) reach, of which at least k + 1 places and k numbers are
// there.
template <class Item>
__device__ uint64_t find_bound(SelectScratch& scratch, Item item, uint32_t count, uint32_t k, Digits digits) {
  uint32_t* bins = scratch.bins;
  uint64_t bound = 0, decided = 0;  // the digits found, and a mask of them
  for (int shift = 56;; shift = digits.below(shift)) {
    for (uint32_t i = threadIdx.x; i < 256; i += blockDim.x) bins[i] = 0;
    __syncthreads();
    for (uint32_t start = 0; start < count; start += kRun * blockDim.x) {
      uint64_t numbers[kRun];
      load_run(item, start, count, numbers);
#pragma unroll
      for (int i = 0; i < kRun; ++i) {
        if (numbers[i] && (numbers[i] & decided) == bound) atomicAdd(&bins[numbers[i] >> shift & 255], 1u);
      }
    }
    __syncthreads();
    if (threadIdx.x < 32) {  // lane 0 has the 8 highest digits, lane 1 the next, ...
      uint32_t sum = 0;
      for (int i = 0; i < 8; ++i) sum += bins[255 - 8 * threadIdx.x - i];
      uint32_t above = warp_scan(sum) - sum;
      if (above < k && k <= above + sum) {
        int digit = 255 - 8 * static_cast<int>(threadIdx.x);
        for (; above + bins[digit] < k; --digit) above += bins[digit];
        scratch.digit = digit, scratch.wanted = k - above, scratch.in_bin = bins[digit];
      }
    }
    __syncthreads();
    bound |= static_cast<uint64_t>(scratch.digit) << shift;
    decided |= uint64_t{255} << shift;
    k = scratch.wanted;
    if (scratch.in_bin == k || shift == 0) return max(bound, uint64_t{1});
  }
}

// emit(place, number) for those of item(0 ... count - 1) that reach the bound, in their order; places count
// from 0.
template <class Item, class Emit>
__device__ void collect(SelectScratch& scratch, Item item, uint32_t count, uint64_t bound, Emit emit) {
  uint32_t lane = threadIdx.x % 32, warp = threadIdx.x / 32, before = 0, turn = 0;
  for (uint32_t start = 0; start < count; start += kRun * blockDim.x, turn ^= 1) {
    uint64_t numbers[kRun];
    load_run(item, start, count, numbers);
    uint32_t votes[kRun], total = 0;
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      votes[i] = __ballot_sync(kAllLanes, numbers[i] >= bound);
      total += __popc(votes[i]);
    }
    if (lane == 0) scratch.totals[turn][warp] = total;
    __syncthreads();
    uint32_t of_warp = lane < blockDim.x / 32 ? scratch.totals[turn][lane] : 0;
    uint32_t up_to = warp_scan(of_warp);
    uint32_t place = before + __shfl_sync(kAllLanes, up_to - of_warp, warp);
    before += __shfl_sync(kAllLanes, up_to, 31);
#pragma unroll
    for (int i = 0; i < kRun; ++i) {
      if (numbers[i] >= bound) emit(place + __popc(votes[i] & ((1u << lane) - 1)), numbers[i]);
      place += __popc(votes[i]);
    }
  }
}

// emit(place, number) for the k best of item(0 ... count - 1), in their order.
template <class Item, class Emit>
__device__ void select_best(SelectScratch& scratch, Item item, uint32_t count, uint32_t k, Digits digits,
                            Emit emit) {
  if (k >= count) {
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) emit(i, item(i));
  } else {
    collect(scratch, item, count, find_bound(scratch, item, count, k, digits), emit);
  }
}

// Best first; count is a power of two (a bitonic sort). 64 neighbours are sorted by one warp, which waits for
// nobody else.
__device__ void sort_best_first(uint64_t* numbers, uint32_t count) {
  __syncthreads();
  for (uint32_t size = 2; size <= count; size *= 2) {
    for (uint32_t distance = size / 2; distance; distance /= 2) {
      for (uint32_t i = threadIdx.x; i < count / 2; i += blockDim.x) {
        uint32_t low = 2 * i - (i & (distance - 1)), high = low + distance;
        bool falling = (low & size) == 0;
        uint64_t a = numbers[low], b = numbers[high];
        if (falling == (a < b)) numbers[low] = b, numbers[high] = a;
      }
      bool crosses = distance > 32 || (distance == 1 && size >= 64);
      crosses ? __syncthreads() : __syncwarp();
    }
  }
  __syncthreads();
}

}  // namespace
}  // namespace pyspec
