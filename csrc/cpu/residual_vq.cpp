#include "params/residual_vq.h"

#include "boundary.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_residual_vq, pyspec::VqAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_residual_vq_encode, pyspec::VqEncodeParams);

// Of codebooks whose last four dimensions are [2, depth, codes, 32].
pyspec::VqFormat format_of(const Tensor& codebooks, int64_t dims, int64_t head_dim) {
  STD_TORCH_CHECK(codebooks.scalar_type() == ScalarType::Half && codebooks.dim() == dims,
                  "codebooks must be float16 of ", dims, " dimensions");
  int64_t depth = codebooks.size(dims - 3), codes = codebooks.size(dims - 2);
  STD_TORCH_CHECK(codebooks.size(dims - 4) == 2 && depth >= 1 && depth <= pyspec::kVqMostDepth &&
                      (codes == 256 || codes == 2048) && codebooks.size(dims - 1) == pyspec::kVqWidth,
                  "codebooks must be [2, depth up to ", pyspec::kVqMostDepth, ", 256 or 2048, ",
                  pyspec::kVqWidth, "]");
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= dims - 4; stride *= codebooks.size(i--))
    STD_TORCH_CHECK(codebooks.stride(i) == stride, "codebooks must be contiguous");
  STD_TORCH_CHECK(head_dim % pyspec::kVqWidth == 0 && head_dim >= 64 && head_dim <= 256,
                  "the head_dim must be a multiple of 32 from 64 to 256, got ", head_dim);
  return {depth, codes};
}

void copy_strides(const Tensor& tensor, int64_t* strides) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

Tensor residual_vq_encode(const Tensor& k, const Tensor& v, const Tensor& codebooks) {
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "k and v must have 4 dimensions");
  pyspec::VqEncodeParams p{};
  p.element = pyspec::element_of(k, "k");
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), "v must have the dtype of k");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(v.size(i) == k.size(i), "v must have the shape of k");
  STD_TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1, "k and v must have a contiguous last dimension");
  STD_TORCH_CHECK(k.size(2) % pyspec::kVqBlock == 0, "k must have a multiple of ", pyspec::kVqBlock,
                  " tokens, got ", k.size(2));
  p.batch = k.size(0), p.kv_heads = k.size(1), p.blocks = k.size(2) / pyspec::kVqBlock,
  p.head_dim = k.size(3);
  p.format = format_of(codebooks, 5, p.head_dim);
  STD_TORCH_CHECK(codebooks.size(0) == p.batch, "codebooks must have batch ", p.batch);
  Tensor packed = torch::stable::new_empty(
      k, {p.batch, p.kv_heads, p.blocks, pyspec::vq_record_bytes(p.format, p.head_dim)}, ScalarType::Byte);
  p.k = k.data_ptr(), p.v = v.data_ptr(), p.packed = static_cast<uint8_t*>(packed.data_ptr());
  p.codebooks = static_cast<const uint16_t*>(codebooks.data_ptr());
  p.codebooks_stride = codebooks.stride(0);
  copy_strides(k, p.k_strides), copy_strides(v, p.v_strides);
  p.parallel_for = pyspec::parallel_for;
  if (p.batch * p.kv_heads * p.blocks > 0) pyspec_residual_vq_encode_table[pyspec::instruction_set()](p);
  return packed;
}

std::tuple<Tensor, Tensor> residual_vq(const Tensor& q, const Tensor& packed, const Tensor& seen,
                                       const Tensor& codebooks, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && packed.dim() == 4, "q and packed must have 4 dimensions");
  pyspec::VqAttentionParams p{};
  p.element = pyspec::element_of(q, "q");
  p.batch = q.size(0), p.heads = q.size(1), p.nodes = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = packed.size(1);
  p.format = format_of(codebooks, 4, p.head_dim);
  STD_TORCH_CHECK(q.stride(3) == 1, "q must have a contiguous last dimension");
  STD_TORCH_CHECK(packed.scalar_type() == ScalarType::Byte && packed.size(0) == p.batch &&
                      packed.size(3) == pyspec::vq_record_bytes(p.format, p.head_dim) &&
                      packed.stride(3) == 1,
                  "packed must be uint8 [batch, kv_heads, blocks, ",
                  pyspec::vq_record_bytes(p.format, p.head_dim), "] with a contiguous last dimension");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                  "packed must have a number of heads that divides q's");
  STD_TORCH_CHECK(seen.scalar_type() == ScalarType::Int && seen.dim() == 2 && seen.size(0) == p.batch &&
                      seen.size(1) == p.nodes,
                  "seen must be int32 [batch, nodes]");
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);

  Tensor blocks = torch::stable::contiguous(seen);
  p.seen = static_cast<const int32_t*>(blocks.data_ptr());
  for (int64_t b = 0; b < p.batch; ++b) {
    for (int64_t node = 0; node < p.nodes; ++node) {
      int64_t count = p.seen[b * p.nodes + node];
      STD_TORCH_CHECK(count >= 0 && count <= packed.size(2), "seen[", b, "][", node, "] is ", count,
                      ", packed has ", packed.size(2), " blocks");
      if (count > p.most_seen) p.most_seen = count;
    }
  }
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.nodes}, ScalarType::Float);
  p.q = q.data_ptr(), p.packed = static_cast<const uint8_t*>(packed.data_ptr()), p.out = out.data_ptr();
  p.codebooks = static_cast<const uint16_t*>(codebooks.data_ptr());
  p.lse = static_cast<float*>(lse.data_ptr());
  copy_strides(q, p.q_strides), copy_strides(out, p.out_strides), copy_strides(packed, p.packed_strides);
  p.scale = static_cast<float>(scale);
  p.parallel_for = pyspec::parallel_for;
  p.workspace = pyspec::workspace(pyspec::vq_workspace_floats(p));
  if (p.batch * p.heads * p.nodes > 0) pyspec_residual_vq_table[pyspec::instruction_set()](p);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("residual_vq_encode", TORCH_BOX(&residual_vq_encode));
  m.impl("residual_vq", TORCH_BOX(&residual_vq));
}
