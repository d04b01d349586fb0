// topk on the GPU: each value of a row becomes one number (topk_values.h), larger where it is better, and the
// k largest numbers are the result.
//
// Slices: as many blocks share a row as the GPU has room for. Each leaves its best in the workspace, and a
// second launch goes on from there.
// Exact, up to kMostSorted: a slice is read once, into registers. The best key of each thread gives a lower
// bound (select.h), what reaches it is little more than k, and after the last slice it is sorted. Where keys
// are equal or in an order of their own, too many reach the bound: then, and for a larger k, digits are
// counted, reading the slice again from the L2 cache.
// Buckets (topk_buckets.h) are one pass; where they keep more than k, those are selected from as above.
//
// Without `sorted`, up to kMostSorted that were selected are best first too. What was not is in the order of
// the buckets, and a larger exact result in that of the indices. Bound by memory, for few rows by latency.
#include <cuda_runtime.h>

#include "cuda/overlap.h"
#include "cuda/select.h"
#include "cuda/topk_buckets.h"
#include "params/topk.h"

extern __shared__ uint4 dynamic_shared[];

namespace {

using pyspec::BFloat16;
using pyspec::column_size;
using pyspec::Element;
using pyspec::fill_from_row;
using pyspec::fill_list;
using pyspec::Float16;
using pyspec::Float32;
using pyspec::Row;
using pyspec::select_best;
using pyspec::SelectScratch;
using pyspec::TopkParams;

constexpr int kMostThreads = 512;                // of which a multiprocessor has two blocks
constexpr int64_t kBlocksPerMultiprocessor = 2;  // which takes 64 registers a thread
constexpr int64_t kShared = 46 * 1024;           // bytes; with what is static what every block may have
constexpr int64_t kMostSorted = 256;             // k that a few more than k are sorted for
constexpr uint32_t kRoom = 2048;                 // numbers there is room for, then
constexpr int kHeld = 8;                         // vectors of 16 bytes that a thread holds of its slice
constexpr int64_t kLeastSlice = 4096;            // values of a row that are worth a block
constexpr int64_t kLeastCut = 8;                 // or so many for each that a slice keeps

// What both launches do, decided on the host.
struct Plan {
  pyspec::Digits digits;
  uint32_t flip;         // all bits for the smallest values, else none
  uint32_t kept;         // numbers that a slice leaves: of its buckets, or k and some room
  uint32_t ranks;        // places for sorting, or 0 where nothing is sorted
  uint32_t slices;       // blocks that share a row
  bool exact, narrows;   // narrows: k is at most kMostSorted
  bool kept_in_shared;   // else in the workspace, with several slices there too
  bool ranks_in_shared;  // else in the workspace
  uint32_t shared_kept;  // numbers in shared memory before those of the ranks
  int64_t row_numbers;   // of the workspace, for each row: [slices, kept], then [ranks]
  uint64_t* workspace;   // [rows, row_numbers]
};

// ==== the best of a slice, or of numbers ====

// A thread's part of a slice of the row, in registers: vectors, and of what is before and behind those of the
// row one value.
template <class T>
struct Part {
  static constexpr int kSize = 16 / sizeof(typename T::Bits);
  const Row<T>& row;
  uint32_t first;   // value of the first vector
  int vectors;      // one from each stretch of the block
  uint32_t single;  // value, or behind the row
  pyspec::Words<16> held[kHeld];
  uint32_t held_single;

  __device__ uint32_t place(int i) const { return first + i * blockDim.x * kSize; }
  __device__ void load() {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i < vectors) held[i] = row.template load<kSize>(place(i));
    }
    if (single < row.n) held_single = row.x[single];
  }
  // take(key, low half of the number)
  template <class Take>
  __device__ void each(Take take) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i >= vectors) break;
#ifdef __CUDA_ARCH__  // there are not the registers to keep keys for the next time
      for (uint32_t& word : held[i].words) asm volatile("" : "+r"(word));
#endif
#pragma unroll
      for (int e = 0; e < kSize; ++e) take(row.key_of(held[i], e), row.n - 1 - place(i) - e);
    }
    if (single < row.n) take(row.key(held_single), row.n - 1 - single);
  }
};

// Numbers that are somewhere in memory.
struct Numbers {
  const uint64_t* numbers;
  uint32_t count;

  __device__ uint64_t operator()(uint32_t i) const { return numbers[i]; }
  template <class Take>
  __device__ void each(Take take) const {
#pragma unroll 4
    for (uint32_t i = threadIdx.x; i < count; i += blockDim.x) {
      uint64_t number = numbers[i];
      take(static_cast<uint32_t>(number >> 32), static_cast<uint32_t>(number));
    }
  }
};

// Writes the k best, and perhaps a few more, to ranks [kRoom], and says how many those are. Where they are
// too many, they are selected from item(0 ... count - 1), which are the same numbers.
template <class Each, class Item>
__device__ uint32_t narrow(SelectScratch& scratch, const Plan& plan, uint64_t* ranks, uint32_t k,
                           Each& numbers, Item item, uint32_t count) {
  uint32_t best = 0;
  numbers.each([&](uint32_t key, uint32_t) { best = max(best, key); });
  if (threadIdx.x == 0) scratch.found = 0;
  uint32_t bound = max(pyspec::at_most_bound(best, k), 1u);
  numbers.each([&](uint32_t key, uint32_t low) {
    if (key < bound) return;
    uint32_t place = atomicAdd(&scratch.found, 1u);
    if (place < kRoom) ranks[place] = static_cast<uint64_t>(key) << 32 | low;
  });
  __syncthreads();
  uint32_t found = scratch.found;
  if (found <= kRoom) return found;
  select_best(scratch, item, count, k, plan.digits,
              [&](uint32_t at, uint64_t number) { ranks[at] = number; });
  __syncthreads();
  return k;
}

__device__ void sort(uint64_t* ranks, uint32_t found) {
  uint32_t size = 1;
  while (size < found) size *= 2;
  for (uint32_t i = found + threadIdx.x; i < size; i += blockDim.x) ranks[i] = 0;
  pyspec::sort_best_first(ranks, size);
}

// ==== the result ====

// Where a row's result goes. Values are those of x bit for bit, most of them without waiting for x once more.
struct Result {
  const TopkParams& p;
  int64_t row;

  __device__ void write(uint32_t place, uint64_t number) const {
    int64_t index = p.n - 1 - static_cast<uint32_t>(number), to = row * p.k + place,
            from = row * p.stride + index;
    p.indices[to] = index;
    if (p.element == Element::kFloat32) return pyspec::copy_value<Float32>(p, number, from, to);
    if (p.element == Element::kFloat16) return pyspec::copy_value<Float16>(p, number, from, to);
    pyspec::copy_value<BFloat16>(p, number, from, to);
  }
  __device__ void write_sorted(uint64_t* ranks, uint32_t found) const {
    sort(ranks, found);
    for (uint32_t i = threadIdx.x; i < p.k; i += blockDim.x) write(i, ranks[i]);
  }
};

// Counts digits of item(0 ... count - 1), in whose order the result is, or best first.
template <class Item>
__device__ void write_counted(SelectScratch& scratch, const Plan& plan, const Result& result, uint64_t* ranks,
                              Item item, uint32_t count) {
  uint32_t k = static_cast<uint32_t>(result.p.k);
  select_best(scratch, item, count, k, plan.digits, [&](uint32_t place, uint64_t number) {
    if (plan.ranks) {
      ranks[place] = number;
    } else {
      result.write(place, number);
    }
  });
  if (!plan.ranks) return;
  __syncthreads();
  result.write_sorted(ranks, k);
}

__device__ void write_best_of(SelectScratch& scratch, const Plan& plan, const Result& result, uint64_t* ranks,
                              const uint64_t* list, uint32_t count) {
  Numbers numbers{list, count};
  if (plan.narrows && plan.ranks) {
    uint32_t k = static_cast<uint32_t>(result.p.k);
    result.write_sorted(ranks, narrow(scratch, plan, ranks, k, numbers, numbers, count));
  } else {
    write_counted(scratch, plan, result, ranks, numbers, count);
  }
}

// ==== the kernels ====

// Where a block works.
struct Place {
  uint64_t *shared, *lists, *ranks;  // lists [slices, kept] and perhaps ranks in the workspace

  __device__ Place(const Plan& plan, int64_t row)
      : shared(reinterpret_cast<uint64_t*>(dynamic_shared)), lists(plan.workspace + row * plan.row_numbers) {
    ranks = plan.ranks_in_shared ? shared + plan.shared_kept : lists + plan.row_numbers - plan.ranks;
  }
};

template <class T>
__device__ void search_slice(SelectScratch& scratch, const TopkParams& p, const Plan& plan, const Row<T>& row,
                             const Place& at, const Result& result, uint32_t slice) {
  constexpr int kSize = Part<T>::kSize;
  uint64_t* mine = at.lists + static_cast<int64_t>(slice) * plan.kept;
  uint32_t k = static_cast<uint32_t>(p.k), found;
  if (plan.narrows) {
    // The values in front of the first vector and behind the last are the first slice's too.
    uint32_t front = min((kSize - row.template lead<kSize>()) % kSize, row.n),
             vectors = (row.n - front) / kSize;
    uint32_t singles = slice ? 0 : row.n - vectors * kSize, behind = vectors * kSize;
    uint32_t each = (vectors + plan.slices - 1) / plan.slices, begin = min(slice * each, vectors);
    uint32_t size = min(each, vectors - begin), start = front + begin * kSize;
    auto single = [&](uint32_t i) { return i < front ? i : i + behind; };
    auto item = [&](uint32_t i) {
      return row.number_at(i < size * kSize ? start + i : single(i - size * kSize));
    };
    Part<T> part{row};
    part.first = start + threadIdx.x * kSize;
    part.vectors = threadIdx.x < size ? static_cast<int>((size - threadIdx.x - 1) / blockDim.x) + 1 : 0;
    part.single = threadIdx.x < singles ? single(threadIdx.x) : row.n;
    part.load();
    found = narrow(scratch, plan, at.ranks, k, part, item, size * kSize + singles);
    if (plan.slices == 1) return result.write_sorted(at.ranks, found);
    if (found > plan.kept) {
      sort(at.ranks, found);
      found = k;
    }
    for (uint32_t i = threadIdx.x; i < found; i += blockDim.x) mine[i] = at.ranks[i];
  } else {
    uint32_t begin = static_cast<uint32_t>(p.n * slice / plan.slices);
    uint32_t count = static_cast<uint32_t>(p.n * (slice + 1) / plan.slices) - begin;
    auto item = [&](uint32_t i) { return row.number_at(begin + i); };
    if (plan.slices == 1) return write_counted(scratch, plan, result, at.ranks, item, count);
    found = min(k, count);
    select_best(scratch, item, count, k, plan.digits, [&](uint32_t i, uint64_t number) { mine[i] = number; });
  }
  for (uint32_t i = found + threadIdx.x; i < plan.kept; i += blockDim.x) mine[i] = 0;
}

// Grid [rows * slices]. kPerBucket 0: exact.
template <class T, int kPerBucket>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerMultiprocessor)
    topk_kernel(const __grid_constant__ TopkParams p, const __grid_constant__ Plan plan) {
  __shared__ SelectScratch scratch;
  pyspec::wait_for_inputs();
  int64_t row_number = blockIdx.x / plan.slices;
  uint32_t slice = blockIdx.x % plan.slices;
  Row<T> row{static_cast<const typename T::Bits*>(p.x) + row_number * p.stride, static_cast<uint32_t>(p.n),
             plan.flip};
  Place at(plan, row_number);
  Result result{p, row_number};
  if constexpr (kPerBucket == 0) {
    search_slice(scratch, p, plan, row, at, result, slice);
  } else {
    bool is_list_shared = plan.slices == 1 && plan.kept_in_shared;
    uint64_t* list = is_list_shared ? at.shared : at.lists + static_cast<int64_t>(slice) * plan.kept;
    constexpr int kSize = column_size(kPerBucket);
    if (p.interleaved && p.buckets % kSize == 0) {
      fill_from_row<kPerBucket, kSize>(p, row, slice, plan.slices, list, at.shared);
    } else {
      fill_from_row<kPerBucket, 1>(p, row, slice, plan.slices, list, at.shared);
    }
    if (plan.slices == 1) write_best_of(scratch, plan, result, at.ranks, list, plan.kept);
  }
}

// Goes on where the slices of a row are done. Grid [rows].
template <int kPerBucket>
__global__ void __launch_bounds__(kMostThreads, kBlocksPerMultiprocessor)
    topk_merge_kernel(const __grid_constant__ TopkParams p, const __grid_constant__ Plan plan) {
  __shared__ SelectScratch scratch;
  pyspec::wait_for_inputs();
  Place at(plan, blockIdx.x);
  Result result{p, blockIdx.x};
  if constexpr (kPerBucket == 0) {
    write_best_of(scratch, plan, result, at.ranks, at.lists, plan.slices * plan.kept);
  } else {
    // In the workspace over the first slice's, bucket by bucket.
    uint64_t* list = plan.kept_in_shared ? at.shared : at.lists;
    auto fill = [&](uint32_t bucket, uint32_t share, uint32_t shares, pyspec::Queue<kPerBucket>(&queues)[1]) {
      uint32_t each = (plan.slices + shares - 1) / shares;
      uint32_t end = min((share + 1) * each, plan.slices);
#pragma unroll 4
      for (uint32_t slice = share * each; slice < end; ++slice) {
        const uint64_t* from = at.lists + static_cast<int64_t>(slice) * plan.kept + bucket * kPerBucket;
#pragma unroll
        for (int rank = 0; rank < kPerBucket; ++rank) queues[0].insert(from[rank]);
      }
    };
    auto bucket = [](uint32_t column, int) { return column; };
    fill_list<kPerBucket, 1>(list, at.shared, static_cast<uint32_t>(p.buckets), fill, bucket);
    write_best_of(scratch, plan, result, at.ranks, list, plan.kept);
  }
}

// ==== on the host ====

// Threads of a block, as many as leave the fewest of them without a column.
uint32_t block_threads(const TopkParams& p) {
  if (pyspec::keeps_all(p)) return p.n >= 4 * kMostThreads ? kMostThreads : 256;
  int size = column_size(p.per_bucket);
  int64_t columns = p.interleaved && p.buckets % size == 0 ? p.buckets / size : p.buckets;
  uint32_t best = kMostThreads;
  double best_share = 0;
  for (uint32_t threads = kMostThreads; threads >= 256; threads -= 32) {
    int64_t slots = columns <= threads ? threads : (columns + threads - 1) / threads * threads;
    int64_t used = columns <= threads ? threads / columns * columns : columns;
    double share = static_cast<double>(used) / static_cast<double>(slots);
    if (share > best_share) best = threads, best_share = share;
  }
  return best;
}

// Numbers that a slice leaves behind.
int64_t numbers_of_slice(const TopkParams& p) {
  if (!pyspec::keeps_all(p)) return p.buckets * p.per_bucket;
  return p.k <= kMostSorted ? 2 * p.k : p.k;  // sorting them is rarely worth it
}

Plan make_plan(const TopkParams& p, uint32_t threads) {
  Plan plan{};
  int low = p.element == Element::kFloat32   ? Float32::kKeyLow
            : p.element == Element::kFloat16 ? Float16::kKeyLow
                                             : BFloat16::kKeyLow;
  plan.digits.key_low = 32 + low;
  while (int64_t{1} << plan.digits.index_bits < p.n) ++plan.digits.index_bits;
  plan.flip = p.largest ? 0 : ~0u;
  plan.exact = pyspec::keeps_all(p), plan.narrows = p.k <= kMostSorted;
  plan.kept = static_cast<uint32_t>(numbers_of_slice(p));
  plan.slices = static_cast<uint32_t>(p.segments);
  if (plan.narrows && (plan.exact || plan.kept > p.k || p.sorted)) {
    plan.ranks = kRoom;
  } else if (p.sorted) {
    for (plan.ranks = 1; plan.ranks < static_cast<uint64_t>(p.k);) plan.ranks *= 2;
  }
  if (!plan.exact) {
    // Merging comes before sorting, in the same place.
    int64_t ranks = plan.narrows ? plan.ranks : 0,
            merged = column_size(p.per_bucket) * p.per_bucket * threads / 2;
    plan.kept_in_shared = 8 * (plan.kept + ranks) <= kShared;
    plan.shared_kept = plan.kept_in_shared ? plan.kept : 0;
    plan.shared_kept = static_cast<uint32_t>(max(int64_t{plan.shared_kept}, merged - ranks));
  }
  plan.ranks_in_shared = 8 * (plan.shared_kept + int64_t{plan.ranks}) <= kShared;
  bool needs_lists = plan.slices > 1 || (!plan.exact && !plan.kept_in_shared);
  plan.row_numbers =
      (needs_lists ? int64_t{plan.slices} * plan.kept : 0) + (plan.ranks_in_shared ? 0 : plan.ranks);
  plan.workspace = static_cast<uint64_t*>(p.workspace);
  return plan;
}

using Kernel = void (*)(TopkParams, Plan);

template <class T>
Kernel kernel_of(const TopkParams& p, const Plan& plan) {
  const Kernel kernels[] = {topk_kernel<T, 0>, topk_kernel<T, 1>, topk_kernel<T, 2>, topk_kernel<T, 3>,
                            topk_kernel<T, 4>};
  return kernels[plan.exact ? 0 : p.per_bucket];
}

}  // namespace

// Decides p.segments, the blocks that share a row, for a GPU with so many multiprocessors. Returns the bytes
// of p.workspace that this takes.
extern "C" int64_t pyspec_topk_cuda_plan(pyspec::TopkParams& p, int64_t multiprocessors) {
  bool exact = pyspec::keeps_all(p);
  int64_t twice = exact ? kBlocksPerMultiprocessor : 1, wanted = twice * multiprocessors / p.rows;
  int64_t least =
      twice * max(kLeastSlice, kLeastCut * numbers_of_slice(p));  // selecting from more costs more there
  p.segments = max(min(wanted, p.n / least), int64_t{1});
  if (exact && p.k <= kMostSorted) {  // as many as hold the row
    int64_t size = p.element == Element::kFloat32 ? 4 : 2, held = kHeld * block_threads(p);
    p.segments = max(p.segments, (p.n * size / 16 + held - 1) / held);
  }
  return 8 * p.rows * make_plan(p, block_threads(p)).row_numbers;
}

// One launch, or two where blocks share a row, and none for no rows. Returns a cudaError_t.
extern "C" int pyspec_topk_cuda(const pyspec::TopkParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  uint32_t threads = block_threads(p);
  Plan plan = make_plan(p, threads);
  Kernel search = p.element == Element::kFloat32   ? kernel_of<Float32>(p, plan)
                  : p.element == Element::kFloat16 ? kernel_of<Float16>(p, plan)
                                                   : kernel_of<BFloat16>(p, plan);
  const Kernel merge[] = {topk_merge_kernel<0>, topk_merge_kernel<1>, topk_merge_kernel<2>,
                          topk_merge_kernel<3>, topk_merge_kernel<4>};
  int64_t shared = 8 * (plan.shared_kept + (plan.ranks_in_shared ? plan.ranks : 0));
  pyspec::Launch what{dim3(static_cast<unsigned>(p.rows * plan.slices)), threads, shared, stream};
  cudaError_t error = pyspec::launch(what, search, p, plan);
  if (error != cudaSuccess || plan.slices == 1) return error;
  what.grid = dim3(static_cast<unsigned>(p.rows));
  return pyspec::launch(what, merge[plan.exact ? 0 : p.per_bucket], p, plan);
}
