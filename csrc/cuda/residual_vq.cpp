#include "../residual_vq.h"

#include "boundary.h"

extern "C" int64_t pyspec_residual_vq_cuda_workspace(const pyspec::VqAttentionParams& p);
extern "C" int pyspec_residual_vq_cuda(const pyspec::VqAttentionParams& p, cudaStream_t stream);

namespace {

using torch::stable::Tensor;

std::tuple<Tensor, Tensor> residual_vq(const Tensor& q, const Tensor& quantised, const Tensor& seen,
                                       const Tensor& codebooks, double scale,
                                       const std::optional<Tensor>& rotary,
                                       const std::optional<Tensor>& oldest) {
  auto p = pyspec::vq_attention_params_of(q, quantised, seen, codebooks, scale, rotary);
  STD_TORCH_CHECK(
      quantised.stride(2) % 4 == 0 && quantised.stride(1) % 4 == 0 && quantised.stride(0) % 4 == 0,
      "quantised must have its rows at multiples of 4 bytes");
  STD_TORCH_CHECK(p.kv_heads < 65536 && p.batch < 65536,
                  "quantised must have fewer than 65536 heads and sequences");
  Tensor blocks = torch::stable::contiguous(seen);
  p.seen = static_cast<const int32_t*>(blocks.data_ptr()), p.most_seen = quantised.size(2);
  Tensor tokens = torch::stable::contiguous(oldest.value_or(seen));
  if (oldest) {
    STD_TORCH_CHECK(oldest->scalar_type() == torch::headeronly::ScalarType::Int && oldest->dim() == 2 &&
                        oldest->size(0) == p.batch && oldest->size(1) == p.nodes,
                    "oldest must be int32 [batch, nodes]");
    p.oldest = static_cast<const int32_t*>(tokens.data_ptr());
  }
  auto results = pyspec::set_results(p, q);
  if (p.batch * p.heads * p.nodes == 0) return results;
  pyspec::Gpu gpu = pyspec::gpu_of(q);
  Tensor workspace =
      pyspec::empty(q, 1, pyspec_residual_vq_cuda_workspace(p), torch::headeronly::ScalarType::Float);
  p.workspace = static_cast<float*>(workspace.data_ptr());
  pyspec::check(static_cast<cudaError_t>(pyspec_residual_vq_cuda(p, gpu.stream)), "residual_vq");
  return results;
}

}  // namespace

PYSPEC_CUDA_LIBRARY(m) { m.impl("residual_vq", TORCH_BOX(&residual_vq)); }
