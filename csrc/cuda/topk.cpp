#include "params/topk.h"

#include "boundary.h"

extern "C" int64_t pyspec_topk_cuda_plan(pyspec::TopkParams& p, int64_t multiprocessors);
extern "C" int pyspec_topk_cuda(const pyspec::TopkParams& p, cudaStream_t stream);

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> topk(const Tensor& x, int64_t k, int64_t buckets, int64_t per_bucket,
                                bool interleaved, bool largest, bool sorted) {
  pyspec::TopkParams p{};
  p.element = pyspec::element_of(x, "x");
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1) && x.size(0) < int64_t{1} << 31 &&
                      x.size(1) < int64_t{1} << 31,
                  "x must be [rows, n], both below 2^31, with a contiguous last dimension");
  p.rows = x.size(0), p.n = x.size(1), p.stride = x.stride(0), p.k = k;
  p.buckets = buckets, p.per_bucket = per_bucket;
  p.interleaved = interleaved, p.largest = largest, p.sorted = sorted;
  STD_TORCH_CHECK(1 <= k && k <= p.n, "k must be in [1, n]");
  STD_TORCH_CHECK(per_bucket >= 1 && per_bucket <= pyspec::kMostPerBucket, "per_bucket must be in [1, 4]");
  STD_TORCH_CHECK(buckets == 0 || (buckets > 0 && buckets < int64_t{1} << 31 && buckets * per_bucket >= k),
                  "buckets must be 0 or hold at least k values");
  auto byte = torch::headeronly::ScalarType::Byte, int64 = torch::headeronly::ScalarType::Long;
  Tensor values = pyspec::empty(x, p.rows, k, x.scalar_type());
  Tensor indices = pyspec::empty(x, p.rows, k, int64);
  if (p.rows == 0) return {values, indices};
  p.x = x.data_ptr(), p.values = values.data_ptr();
  p.indices = static_cast<int64_t*>(indices.data_ptr());
  pyspec::Gpu gpu = pyspec::gpu_of(x);
  int64_t bytes = pyspec_topk_cuda_plan(p, gpu.multiprocessors);
  Tensor workspace = pyspec::empty(x, 1, bytes, byte);
  p.workspace = workspace.data_ptr();
  pyspec::check(static_cast<cudaError_t>(pyspec_topk_cuda(p, gpu.stream)), "topk");
  return {values, indices};
}

}  // namespace

PYSPEC_CUDA_LIBRARY(m) { m.impl("topk", TORCH_BOX(&topk)); }
