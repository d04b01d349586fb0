// topk on the GPU, in one launch: each value of a row becomes one number, larger where it is better, and the
// k largest numbers are the result.
//
//   number = key << index_bits | (n - 1 - index)        key: the bits of a float, ordered as TopkParams says
//
// No two numbers of a row are equal, so ties, NaN and signed zeros need no thought from here on, and nothing
// depends on which thread came first. 0 is no value at all.
//
// Buckets: a thread scans one bucket, or one of several shares of it where the row has fewer buckets than the
// block threads, and keeps its best in registers. Shares are merged in shared memory, two by two.
// Selection (select.h), of what the buckets kept or, exactly, of the row itself, keeps their order: without
// `sorted` the result is in the order of the buckets, an exact one in that of the indices. In an exact search
// for few of many values, what is best for each thread gives a lower bound first, and the rest is soon passed
// over.
//
// Long rows: where rows are few, several blocks share one. Each leaves its best in the workspace, and the
// last of them to finish goes on from there.
//
// x is read once with buckets; where exact three times, or for a large k up to seven, mostly from the L2
// cache.
#include <cuda_runtime.h>

#include "cuda/select.h"
#include "params/topk.h"

extern __shared__ uint4 dynamic_shared[];

namespace {

using pyspec::collect;
using pyspec::Element;
using pyspec::find_bound;
using pyspec::select_best;
using pyspec::SelectScratch;
using pyspec::sort_best_first;
using pyspec::TopkParams;

constexpr int kMostThreads = 1024;
constexpr int64_t kShared = 44 * 1024;  // bytes; with what is static below what every block may have
constexpr int kPlaces = 4;              // of a thread, for values that may be among the best
constexpr int64_t kLeastSlice = 8192;   // values of a row that are worth a block
constexpr int64_t kBlocksPerMultiprocessor = 2;

// How the values of a row become numbers.
struct Numbers {
  uint32_t n, index_bits;  // bits that tell the values of a row apart
  uint32_t infinity;       // the bits of +inf: above are NaNs
  uint32_t nan_key;        // the highest; for the smallest values the lowest
  uint32_t flip;           // all bits for the smallest values, else none
  uint32_t lowest;         // key of the worst infinity
  int bits;                // of a number
};

// What one launch does, decided on the host.
struct Plan {
  Numbers numbers;
  uint32_t kept;         // numbers that a block keeps of its slice: k where exact, else buckets * per_bucket
  uint32_t ranks;        // places for sorting: a power of two, or 0 where nothing is sorted
  uint32_t slices;       // blocks that share a row
  bool narrows;          // where exact, whether to look for a lower bound first, in shared memory
  bool kept_in_shared;   // else in the workspace, with several slices there too
  bool ranks_in_shared;  // else in the workspace
  int64_t row_numbers;   // of the workspace, for each row: [slices, kept], then [ranks]
  uint32_t* finished;    // [rows], how many blocks of a row are done; 0 at the start
  uint64_t* workspace;   // [rows, row_numbers]
  uint32_t shared_kept;  // numbers in shared memory before those of the ranks: of buckets, or of threads
};

// ==== values as numbers ====

template <class Bits>
struct Row {
  const Bits* x;
  const Numbers& numbers;

  // Larger for a better value, never 0. bits: those of a value, as a signed integer.
  __device__ uint32_t key(int32_t bits) const {
    if ((bits & kMagnitude) > numbers.infinity) return numbers.nan_key;
    uint32_t ordered = order(bits);
    ordered += ordered == ~0u;  // -0 is +0
    return (ordered ^ numbers.flip) + kSign;
  }
  // In fewer instructions, how far a value is above the worst number. No value's is below limit_above(worst)
  // if its key is above that; a few others are not either, which is for the key to find out.
  __device__ uint32_t height(int32_t bits) const {
    return (order(bits) ^ numbers.flip) - (numbers.lowest - kSign);
  }
  __device__ uint32_t limit_above(uint32_t worst) const {
    return worst < numbers.lowest ? 0 : worst - numbers.lowest + 1;
  }
  // For numbers not below bound. Heights are of values as they are: the least NaN's is next to that of
  // infinity, and that of -0 one below +0's.
  __device__ uint32_t limit_of(uint64_t bound) const {
    uint32_t key = min(static_cast<uint32_t>(bound >> numbers.index_bits), kSign + numbers.infinity + 1);
    return limit_above(max(key, 2u) - 2);
  }
  __device__ uint64_t number(uint32_t key, uint32_t index) const {
    return static_cast<uint64_t>(key) << numbers.index_bits | (numbers.n - 1 - index);
  }
  __device__ uint32_t index(uint64_t number) const {
    return numbers.n - 1 - static_cast<uint32_t>(number & ((uint64_t{1} << numbers.index_bits) - 1));
  }

  static constexpr uint32_t kSign = 1u << (8 * sizeof(Bits) - 1), kMagnitude = kSign - 1;

 private:
  // As integers in two's complement; -0 is -1.
  __device__ static uint32_t order(int32_t bits) { return bits ^ (bits >> 31 & kMagnitude); }
};

// ==== buckets ====

// The best numbers of a share, best first.
template <int kPerBucket>
struct Queue {
  uint64_t numbers[kPerBucket] = {};

  __device__ void insert(uint64_t number) {
#pragma unroll
    for (int rank = 0; rank < kPerBucket; ++rank) {
      uint64_t here = numbers[rank];
      numbers[rank] = number > here ? number : here;
      number = number > here ? here : number;
    }
  }
  __device__ void insert_all(const uint64_t* more) {
#pragma unroll
    for (int rank = 0; rank < kPerBucket; ++rank) insert(more[rank]);
  }
  __device__ void store(uint64_t* to) const {
#pragma unroll
    for (int rank = 0; rank < kPerBucket; ++rank) to[rank] = numbers[rank];
  }
};

// take(key, index) for those of the values at index, index + step, ..., `left` of them, whose height is not
// below limit, which take may raise.
template <class Bits, class Take>
__device__ void visit(const Row<Bits>& row, uint32_t index, uint32_t step, int left, const uint32_t& limit,
                      Take take) {
  constexpr int kAhead = 8;  // loads on their way
  const Bits* x = row.x + index;
  for (; left > 0; left -= kAhead, index += kAhead * step, x += uint64_t{step} * kAhead) {
    int32_t bits[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) bits[i] = i < left ? x[uint64_t{step} * i] : 0;
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (i < left && row.height(bits[i]) >= limit) take(row.key(bits[i]), index + step * i);
    }
  }
}

// How many of 0, 1, ..., size - 1 are share, share + shares, ...
__device__ int share_size(uint32_t size, uint32_t share, uint32_t shares) {
  return share < size ? static_cast<int>((size - share + shares - 1) / shares) : 0;
}

// The best of the same values.
template <int kBest, class Bits>
__device__ Queue<kBest> best_of(const Row<Bits>& row, uint32_t index, uint32_t step, int left) {
  Queue<kBest> queue;
  uint32_t worst = 0;  // key of the last one in the queue; an equal that comes later is worse
  uint32_t limit = 0;
  visit(row, index, step, left, limit, [&](uint32_t key, uint32_t at) {
    if (key <= worst) return;
    queue.insert(row.number(key, at));
    worst = static_cast<uint32_t>(queue.numbers[kBest - 1] >> row.numbers.index_bits);
    limit = row.limit_above(worst);
  });
  return queue;
}

// ... of a share of a bucket.
template <int kPerBucket, class Bits>
__device__ Queue<kPerBucket> best_of_share(const TopkParams& p, const Row<Bits>& row, uint32_t bucket,
                                           uint32_t share, uint32_t shares) {
  uint32_t buckets = static_cast<uint32_t>(p.buckets);
  uint32_t size = row.numbers.n / buckets, larger = row.numbers.n % buckets;
  uint32_t first = p.interleaved ? bucket : bucket * size + min(bucket, larger);
  uint32_t step = p.interleaved ? buckets : 1;
  size += bucket < larger;
  return best_of<kPerBucket>(row, first + share * step, shares * step, share_size(size, share, shares));
}

// Fills list [buckets, kPerBucket] with what feed(bucket, share, shares) finds in all shares of each bucket.
template <int kPerBucket, class Feed>
__device__ void fill_list(uint64_t* list, uint32_t buckets, Feed feed) {
  uint32_t shares = max(blockDim.x / buckets, 1u);
  for (uint32_t task = threadIdx.x; task < buckets * shares; task += blockDim.x) {
    feed(task % buckets, task / buckets, shares).store(list + task * kPerBucket);
  }
  __syncthreads();
  while (shares > 1) {
    uint32_t half = (shares + 1) / 2;
    if (threadIdx.x < (shares - half) * buckets) {
      Queue<kPerBucket> queue;
      queue.insert_all(list + threadIdx.x * kPerBucket);
      queue.insert_all(list + (threadIdx.x + half * buckets) * kPerBucket);
      queue.store(list + threadIdx.x * kPerBucket);
    }
    __syncthreads();
    shares = half;
  }
}

// ==== the exact result ====

// The bound of the k best of values begin ... begin + count - 1, from a few of them: the k-th best of what is
// best for each thread is a lower bound, and those not below it are few. Each thread has places for kPlaces,
// in room; 0 if one has more.
template <class Bits>
__device__ uint64_t narrow_bound(SelectScratch& scratch, const Row<Bits>& row, uint64_t* room, uint32_t begin,
                                 uint32_t count, uint32_t k) {
  uint32_t thread = threadIdx.x, threads = blockDim.x;
  int mine = share_size(count, thread, threads);
  best_of<1>(row, begin + thread, threads, mine).store(room + thread);
  __syncthreads();
  auto item = [&](uint32_t i) { return room[i]; };
  uint64_t bound = find_bound(scratch, item, threads, k, row.numbers.bits);
  uint32_t limit = row.limit_of(bound), found = 0;
  for (int i = 0; i < kPlaces; ++i) room[i * threads + thread] = 0;
  visit(row, begin + thread, threads, mine, limit, [&](uint32_t key, uint32_t index) {
    uint64_t number = row.number(key, index);
    if (number < bound) return;
    if (found < kPlaces) room[found * threads + thread] = number;
    ++found;
  });
  if (__syncthreads_or(found > kPlaces)) return 0;
  // What was left out is below the first bound, and may reach the second, which is a round number.
  return max(bound, find_bound(scratch, item, kPlaces * threads, k, row.numbers.bits));
}

// emit(place, number) for the k best of values begin ... begin + count - 1, in their order.
template <class Bits, class Emit>
__device__ void select_from_row(SelectScratch& scratch, const Plan& plan, const Row<Bits>& row,
                                uint64_t* room, uint32_t begin, uint32_t count, uint32_t k, Emit emit) {
  uint32_t limit = 0;
  auto value = [&](uint32_t i) {
    int32_t bits = row.x[begin + i];
    return row.height(bits) < limit ? 0 : row.number(row.key(bits), begin + i);
  };
  uint64_t bound = plan.narrows ? narrow_bound(scratch, row, room, begin, count, k) : 0;
  if (!bound) {
    select_best(scratch, value, count, k, row.numbers.bits, emit);
    return;
  }
  limit = row.limit_of(bound);
  collect(scratch, value, count, bound, emit);
}

// ==== the kernel: grid [rows * slices] ====

// Writes the result of a row: select(emit) gives its k best to emit(place, number).
template <class Bits, class Select>
__device__ void write_result(const TopkParams& p, const Plan& plan, const Row<Bits>& row, int64_t row_number,
                             uint64_t* ranks, Select select) {
  uint32_t k = static_cast<uint32_t>(p.k);
  int64_t* indices = p.indices + row_number * p.k;
  Bits* values = static_cast<Bits*>(p.values) + row_number * p.k;
  auto write = [&](uint32_t place, uint64_t number) {
    uint32_t index = row.index(number);
    indices[place] = index;
    values[place] = row.x[index];
  };
  for (uint32_t i = k + threadIdx.x; i < plan.ranks; i += blockDim.x) ranks[i] = 0;
  select([&](uint32_t place, uint64_t number) {
    if (plan.ranks) {
      ranks[place] = number;
    } else {
      write(place, number);
    }
  });
  if (!plan.ranks) return;
  sort_best_first(ranks, plan.ranks);
  for (uint32_t i = threadIdx.x; i < k; i += blockDim.x) write(i, ranks[i]);
}

template <class Bits>
__device__ void write_best_of(SelectScratch& scratch, const uint64_t* numbers, uint32_t count,
                              const TopkParams& p, const Plan& plan, const Row<Bits>& row, int64_t row_number,
                              uint64_t* ranks) {
  write_result(p, plan, row, row_number, ranks, [&](auto emit) {
    uint32_t k = static_cast<uint32_t>(p.k);
    select_best(scratch, [&](uint32_t i) { return numbers[i]; }, count, k, plan.numbers.bits, emit);
  });
}

// Whether this block is the last of its row's to come here; then it sees what the others wrote before.
__device__ bool is_last(uint32_t* finished, uint32_t slices) {
  __shared__ bool last;
  __syncthreads();
  if (threadIdx.x == 0) {
    __threadfence();
    last = atomicAdd(finished, 1u) == slices - 1;
    __threadfence();
  }
  __syncthreads();
  return last;
}

// kPerBucket 0: exact.
template <class Bits, int kPerBucket>
__global__ void __launch_bounds__(kMostThreads)
    topk_kernel(const __grid_constant__ TopkParams p, const __grid_constant__ Plan plan) {
  __shared__ SelectScratch scratch;
  uint64_t* shared = reinterpret_cast<uint64_t*>(dynamic_shared);
  int64_t row_number = blockIdx.x / plan.slices;
  uint32_t slice = blockIdx.x % plan.slices, kept = plan.kept;
  Row<Bits> row{static_cast<const Bits*>(p.x) + row_number * p.stride, plan.numbers};
  uint64_t* lists = plan.workspace + row_number * plan.row_numbers;  // [slices, kept]
  uint64_t* mine = lists + static_cast<int64_t>(slice) * kept;
  uint64_t* ranks = plan.ranks_in_shared ? shared + plan.shared_kept : lists + plan.row_numbers - plan.ranks;

  if constexpr (kPerBucket == 0) {
    uint32_t begin = static_cast<uint32_t>(p.n * slice / plan.slices);
    uint32_t count = static_cast<uint32_t>(p.n * (slice + 1) / plan.slices) - begin;
    auto select = [&](auto emit) { select_from_row(scratch, plan, row, shared, begin, count, kept, emit); };
    if (plan.slices == 1) {
      write_result(p, plan, row, row_number, ranks, select);
      return;
    }
    select([&](uint32_t place, uint64_t number) { mine[place] = number; });
    if (!is_last(plan.finished + row_number, plan.slices)) return;
    write_best_of(scratch, lists, plan.slices * kept, p, plan, row, row_number, ranks);
  } else {
    uint32_t buckets = static_cast<uint32_t>(p.buckets);
    uint64_t* list = plan.kept_in_shared ? shared : mine;
    fill_list<kPerBucket>(list, buckets, [&](uint32_t bucket, uint32_t share, uint32_t shares) {
      return best_of_share<kPerBucket>(p, row, bucket, slice * shares + share, plan.slices * shares);
    });
    if (plan.slices > 1) {
      if (plan.kept_in_shared) {
        for (uint32_t i = threadIdx.x; i < kept; i += blockDim.x) mine[i] = list[i];
      }
      if (!is_last(plan.finished + row_number, plan.slices)) return;
      list =
          plan.kept_in_shared ? shared : lists;  // in the workspace over the first slice's, bucket by bucket
      fill_list<kPerBucket>(list, buckets, [&](uint32_t bucket, uint32_t share, uint32_t shares) {
        Queue<kPerBucket> queue;
        for (uint32_t i = share; i < plan.slices; i += shares) {
          queue.insert_all(lists + static_cast<int64_t>(i) * kept + bucket * kPerBucket);
        }
        return queue;
      });
    }
    write_best_of(scratch, list, kept, p, plan, row, row_number, ranks);
  }
}

// ==== on the host ====

// Threads of a block, as many as leave the fewest of them without a bucket.
uint32_t block_threads(const TopkParams& p) {
  if (pyspec::keeps_all(p)) return p.n >= 4 * kMostThreads ? kMostThreads : 256;
  uint32_t best = kMostThreads;
  double best_share = 0;
  for (uint32_t threads = kMostThreads; threads >= 256; threads -= 32) {
    int64_t slots = p.buckets <= threads ? threads : (p.buckets + threads - 1) / threads * threads;
    int64_t used = p.buckets <= threads ? threads / p.buckets * p.buckets : p.buckets;
    double share = static_cast<double>(used) / static_cast<double>(slots);
    if (share > best_share) best = threads, best_share = share;
  }
  return best;
}

Numbers make_numbers(const TopkParams& p) {
  Numbers numbers{};
  bool is_wide = p.element == Element::kFloat32;
  numbers.n = static_cast<uint32_t>(p.n);
  while (uint64_t{1} << numbers.index_bits < static_cast<uint64_t>(p.n)) ++numbers.index_bits;
  numbers.infinity = is_wide ? 0x7f800000u : p.element == Element::kFloat16 ? 0x7c00u : 0x7f80u;
  numbers.nan_key = !p.largest ? 1 : is_wide ? 0xffffffffu : 0xffffu;
  numbers.flip = p.largest ? 0 : ~0u;
  numbers.lowest = (is_wide ? 0x7fffffffu : 0x7fffu) - numbers.infinity;
  numbers.bits = (is_wide ? 32 : 16) + static_cast<int>(numbers.index_bits);
  return numbers;
}

Plan make_plan(const TopkParams& p, uint32_t threads) {
  Plan plan{};
  bool exact = pyspec::keeps_all(p);
  plan.kept = static_cast<uint32_t>(pyspec::segment_candidates(p));
  plan.slices = static_cast<uint32_t>(p.segments);
  plan.numbers = make_numbers(p);
  if (p.sorted) {
    for (plan.ranks = 1; plan.ranks < static_cast<uint64_t>(p.k);) plan.ranks *= 2;
  }
  if (exact) {
    // Up to a quarter of the threads, few rows in random order have a thread with more than kPlaces.
    plan.narrows = p.n / p.segments >= 8 * threads && p.k <= threads / 4;
    plan.shared_kept = plan.narrows ? kPlaces * threads : 0;
  } else {
    int64_t shares = p.buckets < threads ? threads / p.buckets : 1;
    plan.kept_in_shared = 8 * shares * plan.kept <= kShared;
    plan.shared_kept = plan.kept_in_shared ? static_cast<uint32_t>(shares) * plan.kept : 0;
  }
  plan.ranks_in_shared = 8 * (plan.shared_kept + int64_t{plan.ranks}) <= kShared;
  bool needs_lists = plan.slices > 1 || (!exact && !plan.kept_in_shared);
  plan.row_numbers =
      (needs_lists ? int64_t{plan.slices} * plan.kept : 0) + (plan.ranks_in_shared ? 0 : plan.ranks);
  plan.workspace = static_cast<uint64_t*>(p.workspace);
  plan.finished = reinterpret_cast<uint32_t*>(plan.workspace + p.rows * plan.row_numbers);
  return plan;
}

template <class Bits>
cudaError_t launch(const TopkParams& p, cudaStream_t stream) {
  using Kernel = void (*)(TopkParams, Plan);
  const Kernel kernels[] = {topk_kernel<Bits, 0>, topk_kernel<Bits, 1>, topk_kernel<Bits, 2>,
                            topk_kernel<Bits, 3>, topk_kernel<Bits, 4>};
  uint32_t threads = block_threads(p);
  Plan plan = make_plan(p, threads);
  if (plan.slices > 1) {
    cudaError_t error = cudaMemsetAsync(plan.finished, 0, p.rows * sizeof(uint32_t), stream);
    if (error != cudaSuccess) return error;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(p.rows * plan.slices));
  config.blockDim = dim3(threads);
  config.dynamicSmemBytes = 8 * (plan.shared_kept + (plan.ranks_in_shared ? plan.ranks : 0));
  config.stream = stream;
  return cudaLaunchKernelEx(&config, kernels[pyspec::keeps_all(p) ? 0 : p.per_bucket], p, plan);
}

}  // namespace

// Decides p.segments, the blocks that share a row, for a GPU with so many multiprocessors. Returns the bytes
// of p.workspace that this takes.
extern "C" int64_t pyspec_topk_cuda_plan(pyspec::TopkParams& p, int64_t multiprocessors) {
  int64_t kept = pyspec::segment_candidates(p);
  int64_t wanted = kBlocksPerMultiprocessor * multiprocessors / p.rows;
  p.segments = max(min(wanted, min(p.n / kLeastSlice, p.n / (4 * kept))), int64_t{1});
  Plan plan = make_plan(p, block_threads(p));
  return p.rows * (8 * plan.row_numbers + (plan.slices > 1 ? 4 : 0));
}

// One launch, and none for no rows. Returns a cudaError_t.
extern "C" int pyspec_topk_cuda(const pyspec::TopkParams& p, cudaStream_t stream) {
  if (p.rows == 0) return cudaSuccess;
  return p.element == Element::kFloat32 ? launch<int32_t>(p, stream) : launch<int16_t>(p, stream);
}
