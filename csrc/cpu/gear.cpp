#include "params/gear.h"

#include "boundary.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_gear_packed_attention, pyspec::GearAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_gear_encode, pyspec::GearEncodeParams);

pyspec::GearFormat format_of(int64_t bits, int64_t group, int64_t rank, int64_t outliers, bool rotate,
                             int64_t key_channels, int64_t head_dim) {
  STD_TORCH_CHECK(head_dim % 16 == 0 && head_dim >= 64 && head_dim <= 256,
                  "the head_dim must be a multiple of 16 from 64 to 256, got ", head_dim);
  STD_TORCH_CHECK(bits == 2 || bits == 3 || bits == 4 || bits == 8, "bits must be 2, 3, 4 or 8, got ", bits);
  STD_TORCH_CHECK(
      (group == 32 || group == 64 || group == 128) && (group >= head_dim || head_dim % group == 0),
      "group must be 32, 64 or 128 and divide the head_dim or be at least as large, got ", group);
  STD_TORCH_CHECK(rank >= 0 && rank <= pyspec::kMostRank, "rank must be in [0, ", pyspec::kMostRank,
                  "], got ", rank);
  STD_TORCH_CHECK(outliers >= 0 && outliers <= pyspec::kMostOutliers && outliers % 2 == 0,
                  "outliers must be an even number in [0, ", pyspec::kMostOutliers, "], got ", outliers);
  STD_TORCH_CHECK(!rotate || (head_dim & (head_dim - 1)) == 0,
                  "rotate needs a head_dim that is a power of two, got ", head_dim);
  STD_TORCH_CHECK(
      key_channels % 16 == 0 && key_channels >= 0 && key_channels < head_dim && !(key_channels && rotate),
      "key_channels must be 0 or, without rotate, a multiple of 16 below the head_dim ", head_dim, ", got ",
      key_channels);
  return {bits, group, rank, outliers, rotate, key_channels};
}

void copy_strides(const Tensor& tensor, int64_t* strides) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

Tensor gear_encode(const Tensor& k, const Tensor& v, const Tensor& channels, int64_t bits, int64_t group,
                   int64_t rank, int64_t outliers, bool rotate, int64_t key_channels, bool fitted) {
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && channels.dim() == 4,
                  "k, v and channels must have 4 dimensions");
  pyspec::GearEncodeParams p{};
  p.element = pyspec::element_of(k, "k");
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), "v must have the dtype of k");
  for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(v.size(i) == k.size(i), "v must have the shape of k");
  STD_TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1, "k and v must have a contiguous last dimension");
  STD_TORCH_CHECK(k.size(2) % pyspec::kBlock == 0, "k must have a multiple of ", pyspec::kBlock,
                  " tokens, got ", k.size(2));
  p.batch = k.size(0), p.kv_heads = k.size(1), p.blocks = k.size(2) / pyspec::kBlock, p.head_dim = v.size(3);
  p.format = format_of(bits, group, rank, outliers, rotate, key_channels, p.head_dim);
  p.fitted = fitted;
  int64_t key_dim = pyspec::gear_key_dim(p.format, p.head_dim);
  STD_TORCH_CHECK(k.size(3) == key_dim, "k must have ", key_dim, " channels, got ", k.size(3));
  Tensor kept = torch::stable::contiguous(channels);
  STD_TORCH_CHECK(kept.scalar_type() == torch::headeronly::ScalarType::Byte && kept.size(0) == p.batch &&
                      kept.size(1) == p.kv_heads && kept.size(2) == p.blocks && kept.size(3) == key_channels,
                  "channels must be uint8 [batch, kv_heads, blocks, ", key_channels, "]");
  p.channels = static_cast<const uint8_t*>(kept.data_ptr());
  Tensor packed = torch::stable::new_empty(
      k, {p.batch, p.kv_heads, p.blocks, pyspec::gear_record_bytes(p.format, p.head_dim)},
      torch::headeronly::ScalarType::Byte);
  p.k = k.data_ptr(), p.v = v.data_ptr(), p.packed = static_cast<uint8_t*>(packed.data_ptr());
  copy_strides(k, p.k_strides), copy_strides(v, p.v_strides);
  p.parallel_for = pyspec::parallel_for;
  if (p.batch * p.kv_heads * p.blocks > 0) pyspec_gear_encode_table[pyspec::instruction_set()](p);
  return packed;
}

std::tuple<Tensor, Tensor> gear_packed_attention(const Tensor& q, const Tensor& packed, const Tensor& seen,
                                                 int64_t bits, int64_t group, int64_t rank, int64_t outliers,
                                                 bool rotate, int64_t key_channels, double scale) {
  STD_TORCH_CHECK(q.dim() == 4 && packed.dim() == 4, "q and packed must have 4 dimensions");
  pyspec::GearAttentionParams p{};
  p.element = pyspec::element_of(q, "q");
  p.batch = q.size(0), p.heads = q.size(1), p.nodes = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = packed.size(1);
  p.format = format_of(bits, group, rank, outliers, rotate, key_channels, p.head_dim);
  STD_TORCH_CHECK(q.stride(3) == 1, "q must have a contiguous last dimension");
  STD_TORCH_CHECK(packed.scalar_type() == torch::headeronly::ScalarType::Byte && packed.size(0) == p.batch &&
                      packed.size(3) == pyspec::gear_record_bytes(p.format, p.head_dim) &&
                      packed.stride(3) == 1,
                  "packed must be uint8 [batch, kv_heads, blocks, ",
                  pyspec::gear_record_bytes(p.format, p.head_dim), "] with a contiguous last dimension");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                  "packed must have a number of heads that divides q's");
  STD_TORCH_CHECK(seen.scalar_type() == torch::headeronly::ScalarType::Int && seen.dim() == 2 &&
                      seen.size(0) == p.batch && seen.size(1) == p.nodes,
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
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.nodes}, torch::headeronly::ScalarType::Float);
  p.q = q.data_ptr(), p.packed = static_cast<const uint8_t*>(packed.data_ptr()), p.out = out.data_ptr();
  p.lse = static_cast<float*>(lse.data_ptr());
  copy_strides(q, p.q_strides), copy_strides(out, p.out_strides), copy_strides(packed, p.packed_strides);
  p.scale = static_cast<float>(scale);
  p.parallel_for = pyspec::parallel_for;
  p.workspace = pyspec::workspace(pyspec::gear_workspace_floats(p));
  if (p.batch * p.heads * p.nodes > 0) pyspec_gear_packed_attention_table[pyspec::instruction_set()](p);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("gear_encode", TORCH_BOX(&gear_encode));
  m.impl("gear_packed_attention", TORCH_BOX(&gear_packed_attention));
}
