// topk: the k largest (or smallest) of each row, exactly, or the best of what buckets of a row keep.
//
// A row of n values falls into `buckets` buckets. Bucket i owns, with size = n / buckets,
//   interleaved: values i, i + buckets, i + 2 buckets, ...;
//   contiguous: a run of neighbours, in order; the first n % buckets runs have size + 1 values, others size.
// Each bucket keeps its per_bucket best and the result is the k best of all that is kept. Where every bucket
// keeps all it has (keeps_all), that is the exact result.
//
// What is best: values are compared as numbers (-0 equals +0), NaN is above +inf whatever its sign, and of
// equals the one with the lower index is better, also for the smallest. Values are copied from x, bit for
// bit.
#pragma once

#include "params/common.h"

namespace pyspec {

struct TopkParams {
  const void* x;     // [rows, n], the last dimension contiguous
  void* values;      // [rows, k], of x's type: x at indices
  int64_t* indices;  // [rows, k], in [0, n), different from each other in a row

  int64_t rows, n, k;  // 1 <= k <= n < 2^31
  int64_t stride;      // elements from row to row of x
  int64_t buckets;     // 0: exact; else buckets * per_bucket >= k
  int64_t per_bucket;  // 1 to kMostPerBucket
  Element element;
  bool interleaved, largest;
  bool sorted;  // best first; else in an order that the row alone decides

  int64_t segments;          // parts of a row that threads take apart from each other: topk_segments
  void* workspace;           // [topk_workspace_bytes], 64-byte aligned
  ParallelFor parallel_for;  // CPU only; on a GPU pyspec_topk_cuda_plan says the two above
};

namespace {

constexpr int64_t kMostPerBucket = 4;
constexpr int64_t kWorthAThread = 32768;  // values; waking a thread takes as long as passing over so many

// Whether a row is compared as a whole: asked for, or because no bucket would leave anything out.
inline bool keeps_all(const TopkParams& p) { return p.buckets == 0 || p.buckets * p.per_bucket >= p.n; }

// Parts that a row is worth being cut into. The result does not depend on them.
inline int64_t topk_segments(const TopkParams& p, int64_t threads) {
  if (p.rows >= 4 * threads || (!p.interleaved && !keeps_all(p))) return 1;
  int64_t most = p.n / kWorthAThread;
  if (!keeps_all(p) && p.n / p.buckets / 16 < most) most = p.n / p.buckets / 16;
  int64_t segments = most < threads ? most : threads;
  return segments < 1 ? 1 : segments;
}

// What a segment hands on: at most so many values.
inline int64_t segment_candidates(const TopkParams& p) {
  return keeps_all(p) ? p.k : p.buckets * p.per_bucket;
}

// A count, keys and indices for each segment of each row.
inline int64_t topk_workspace_bytes(const TopkParams& p) {
  return p.segments == 1 ? 0 : p.rows * p.segments * (8 + 8 * segment_candidates(p));
}

}  // namespace
}  // namespace pyspec
