// The kernel of topk without its binding, into memory that the test brings.
#include <cuda_runtime.h>

#include "params/topk.h"

extern "C" int64_t pyspec_topk_cuda_plan(pyspec::TopkParams& p, int64_t multiprocessors);
extern "C" int pyspec_topk_cuda(const pyspec::TopkParams& p, cudaStream_t stream);

namespace {

pyspec::TopkParams params(int64_t rows, int64_t n, int64_t k, int64_t buckets, int64_t per_bucket,
                          bool sorted) {
  pyspec::TopkParams p{};
  p.rows = rows, p.n = p.stride = n, p.k = k, p.buckets = buckets, p.per_bucket = per_bucket;
  p.element = pyspec::Element::kFloat32;
  p.interleaved = p.largest = true;
  p.sorted = sorted;
  return p;
}

}  // namespace

extern "C" int64_t topk_workspace(int64_t rows, int64_t n, int64_t k, int64_t buckets, int64_t per_bucket,
                                  bool sorted) {
  auto p = params(rows, n, k, buckets, per_bucket, sorted);
  return pyspec_topk_cuda_plan(p, cuda_on_host::device.multiprocessors);
}

extern "C" int topk_into(const void* x, void* values, int64_t* indices, void* workspace, int64_t rows,
                         int64_t n, int64_t k, int64_t buckets, int64_t per_bucket, bool sorted) {
  auto p = params(rows, n, k, buckets, per_bucket, sorted);
  pyspec_topk_cuda_plan(p, cuda_on_host::device.multiprocessors);
  p.x = x, p.values = values, p.indices = indices, p.workspace = workspace;
  return pyspec_topk_cuda(p, nullptr);
}
