#include "params/residual_vq.h"

#include "boundary.h"

extern "C" int64_t pyspec_residual_vq_cuda_workspace(const pyspec::VqAttentionParams& p);
extern "C" int pyspec_residual_vq_cuda(const pyspec::VqAttentionParams& p, cudaStream_t stream);

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

std::tuple<Tensor, Tensor> residual_vq(const Tensor& q, const Tensor& packed, const Tensor& seen,
                                       const Tensor& codebooks, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && packed.dim() == 4, "q and packed must have 4 dimensions");
  pyspec::VqAttentionParams p{};
  p.element = pyspec::element_of(q, "q");
  p.batch = q.size(0), p.heads = q.size(1), p.nodes = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = packed.size(1), p.most_seen = packed.size(2);
  STD_TORCH_CHECK(codebooks.scalar_type() == ScalarType::Half && codebooks.dim() == 4 &&
                      codebooks.size(0) == 2 && codebooks.size(3) == pyspec::kVqWidth &&
                      codebooks.is_contiguous(),
                  "codebooks must be contiguous float16 [2, depth, codes, ", pyspec::kVqWidth, "]");
  p.format = {codebooks.size(1), codebooks.size(2)};
  STD_TORCH_CHECK(p.format.depth >= 1 && p.format.depth <= pyspec::kVqMostDepth &&
                      (p.format.codes == 256 || p.format.codes == 2048),
                  "codebooks must have a depth of at most ", pyspec::kVqMostDepth, " and 256 or 2048 codes");
  STD_TORCH_CHECK(p.head_dim % pyspec::kVqWidth == 0 && q.stride(3) == 1,
                  "q must have a head_dim that is a multiple of 32 and a contiguous last dimension");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.size(0) == p.batch &&
                      packed.size(3) == pyspec::vq_record_bytes(p.format, p.head_dim) &&
                      packed.stride(3) == 1 && packed.stride(2) % 4 == 0 && packed.stride(1) % 4 == 0 &&
                      packed.stride(0) % 4 == 0,
                  "packed must be uint8 [batch, kv_heads, blocks, ",
                  pyspec::vq_record_bytes(p.format, p.head_dim), "], its rows at multiples of 4 bytes");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0 && p.kv_heads < 65536 && p.batch < 65536,
                  "packed must have a number of heads that divides q's");
  STD_TORCH_CHECK(seen.scalar_type() == ScalarType::Int && seen.dim() == 2 && seen.size(0) == p.batch &&
                      seen.size(1) == p.nodes,
                  "seen must be int32 [batch, nodes]");
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);

  Tensor blocks = torch::stable::contiguous(seen);
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.nodes}, ScalarType::Float);
  if (p.batch * p.heads * p.nodes == 0) return {out, lse};
  pyspec::Gpu gpu = pyspec::gpu_of(q);
  Tensor workspace = pyspec::empty(q, 1, pyspec_residual_vq_cuda_workspace(p), ScalarType::Float);
  p.q = q.data_ptr(), p.packed = static_cast<const uint8_t*>(packed.data_ptr());
  p.seen = static_cast<const int32_t*>(blocks.data_ptr());
  p.codebooks = static_cast<const uint16_t*>(codebooks.data_ptr());
  p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
  p.workspace = static_cast<float*>(workspace.data_ptr());
  for (int i = 0; i < 3; ++i) {
    p.q_strides[i] = q.stride(i), p.out_strides[i] = out.stride(i), p.packed_strides[i] = packed.stride(i);
  }
  p.scale = static_cast<float>(scale);
  pyspec::check(static_cast<cudaError_t>(pyspec_residual_vq_cuda(p, gpu.stream)), "residual_vq");
  return {out, lse};
}

}  // namespace

PYSPEC_CUDA_LIBRARY(m) { m.impl("residual_vq", TORCH_BOX(&residual_vq)); }
