// The buckets of topk. A thread scans a column of a few neighbouring buckets, or one of several shares of its
// steps where there are fewer columns than threads, and keeps their best in registers, with the loads of the
// next steps on their way. Shares are merged in shared memory, two by two.
#pragma once

#include "cuda/topk_values.h"
#include "params/topk.h"

namespace pyspec {
namespace {

// Neighbouring buckets of a thread.
PYSPEC_HOST_DEVICE constexpr int column_size(int64_t per_bucket) { return per_bucket < 3 ? 4 : 2; }

// The best numbers of a share of a bucket, best first.
template <int kPerBucket>
struct Queue {
  uint64_t numbers[kPerBucket] = {};

  // Of equals, those that come later are worse.
  __device__ void insert(uint64_t number) {
    bool is_better = false;  // than this one, and so than all behind it
#pragma unroll
    for (int rank = 0; rank < kPerBucket; ++rank) {
      uint64_t here = numbers[rank];
      is_better = is_better || static_cast<uint32_t>(number >> 32) > static_cast<uint32_t>(here >> 32);
      numbers[rank] = is_better ? number : here;
      number = is_better ? here : number;
    }
  }
};

// Steps of a column: its values in step s begin at first + s * stride.
struct Column {
  uint32_t first, stride, steps;
};

// The best of a column's buckets in steps begin ... end - 1. Only at the ends of the row is a step without
// some of the buckets.
template <int kPerBucket, int kSize, class T>
__device__ void scan(const Row<T>& row, const Column& column, uint32_t begin, uint32_t end,
                     Queue<kPerBucket> (&queues)[kSize]) {
  // Steps whose loads are on their way, in 8 registers.
  constexpr int kAhead = kSize == 1 ? 8 : 32 / (kSize * static_cast<int>(sizeof(typename T::Bits)));
  auto scan_end = [&](uint32_t step) {
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      uint32_t index = column.first + step * column.stride + i;  // before the row: very large
      if (index < row.n) queues[i].insert(row.number_at(index));
    }
  };
  if (begin >= end) return;
  uint32_t last = column.first + (end - 1) * column.stride;
  if (column.first >= row.n && begin == 0) scan_end(begin++);
  if (begin < end && last + kSize > row.n) --end;
#pragma unroll 1
  for (uint32_t step = begin; step < end; step += kAhead) {
    uint32_t first = column.first + step * column.stride;
    decltype(row.template load<kSize>(0)) loaded[kAhead];
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step + i < end) loaded[i] = row.template load<kSize>(first + i * column.stride);
    }
#pragma unroll
    for (int i = 0; i < kAhead; ++i) {
      if (step + i >= end) break;
#pragma unroll
      for (int e = 0; e < kSize; ++e) {
        queues[e].insert(row.number(row.key_of(loaded[i], e), first + i * column.stride + e));
      }
    }
  }
  if (last + kSize > row.n) scan_end(end);
}

// Merges the queues of a column's shares, which are in order, into those of the first.
template <int kPerBucket, int kSize>
__device__ void merge_shares(uint64_t* room, uint32_t columns, uint32_t share, uint32_t shares,
                             Queue<kPerBucket> (&queues)[kSize]) {
  uint32_t column = threadIdx.x % columns, places = shares / 2 * columns;
  for (uint32_t by = 1; by < shares; by *= 2) {
    if (share < shares && share % (2 * by) == by) {
#pragma unroll
      for (int i = 0; i < kSize * kPerBucket; ++i) {
        room[i * places + share / 2 * columns + column] = queues[i / kPerBucket].numbers[i % kPerBucket];
      }
    }
    __syncthreads();
    if (share % (2 * by) == 0 && share + by < shares) {
#pragma unroll
      for (int i = 0; i < kSize * kPerBucket; ++i) {
        queues[i / kPerBucket].insert(room[i * places + (share + by) / 2 * columns + column]);
      }
    }
    __syncthreads();
  }
}

// Fills list [buckets, kPerBucket], which may lie in room: fill(column, share, shares, queues) gives the best
// of a column's buckets in a share; bucket(column, i) says which bucket a column's i-th is.
template <int kPerBucket, int kSize, class Fill, class Bucket>
__device__ void fill_list(uint64_t* list, uint64_t* room, uint32_t columns, Fill fill, Bucket bucket) {
  uint32_t shares = max(blockDim.x / columns, 1u), share = threadIdx.x / columns;
  for (uint32_t column = threadIdx.x % columns; column < columns; column += blockDim.x) {
    Queue<kPerBucket> queues[kSize];
    if (share < shares) fill(column, share, shares, queues);
    if (shares > 1) merge_shares(room, columns, share, shares, queues);
    if (share > 0) break;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
#pragma unroll
      for (int rank = 0; rank < kPerBucket; ++rank) {
        list[bucket(column, i) * kPerBucket + rank] = queues[i].numbers[rank];
      }
    }
  }
  __syncthreads();
}

// ... of a slice of the row.
template <int kPerBucket, int kSize, class T>
__device__ void fill_from_row(const TopkParams& p, const Row<T>& row, uint32_t slice, uint32_t slices,
                              uint64_t* list, uint64_t* room) {
  uint32_t buckets = static_cast<uint32_t>(p.buckets), columns = buckets / kSize;
  uint32_t size = row.n / buckets, larger = row.n % buckets;
  uint32_t lead = row.template lead<kSize>();
  auto fill = [&](uint32_t column, uint32_t share, uint32_t shares, Queue<kPerBucket>(&queues)[kSize]) {
    Column at{};
    if (p.interleaved) {
      at = {column * kSize - lead, buckets, size + (larger + lead + buckets - 1) / buckets};
    } else {
      at = {column * size + min(column, larger), 1, size + (column < larger)};
    }
    shares *= slices;
    uint32_t each = (at.steps + shares - 1) / shares;
    uint32_t begin = (slice * (shares / slices) + share) * each;
    scan(row, at, begin, min(begin + each, at.steps), queues);
  };
  auto bucket = [&](uint32_t column, int i) { return (column * kSize + i + buckets - lead) % buckets; };
  fill_list<kPerBucket, kSize>(list, room, columns, fill, bucket);
}

}  // namespace
}  // namespace pyspec
