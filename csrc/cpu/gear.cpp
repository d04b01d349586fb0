#include "params/gear.h"

#include "../quantised.h"
#include "quantised_attention.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_gear, pyspec::GearAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_gear_encode, pyspec::GearEncodeParams);

pyspec::GearFormat format_of(int64_t bits, int64_t group, int64_t rank, int64_t outliers,
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
  STD_TORCH_CHECK(key_channels % 16 == 0 && key_channels >= 0 && key_channels < head_dim,
                  "key_channels must be 0 or a multiple of 16 below the head_dim ", head_dim, ", got ",
                  key_channels);
  return {bits, group, rank, outliers, key_channels};
}

Tensor gear_encode(const Tensor& k, const Tensor& v, const Tensor& channels, int64_t bits, int64_t group,
                   int64_t rank, int64_t outliers, int64_t key_channels, bool fitted) {
  auto p = pyspec::quantised_encode_params<pyspec::GearEncodeParams>(k, v, pyspec::kBlock);
  p.format = format_of(bits, group, rank, outliers, key_channels, p.head_dim);
  p.fitted = fitted;
  int64_t key_dim = pyspec::gear_key_dim(p.format, p.head_dim);
  STD_TORCH_CHECK(k.size(3) == key_dim, "k must have ", key_dim, " channels, got ", k.size(3));
  STD_TORCH_CHECK(channels.dim() == 4, "channels must have 4 dimensions");
  Tensor kept = torch::stable::contiguous(channels);
  STD_TORCH_CHECK(kept.scalar_type() == torch::headeronly::ScalarType::Byte && kept.size(0) == p.batch &&
                      kept.size(1) == p.kv_heads && kept.size(2) == p.blocks && kept.size(3) == key_channels,
                  "channels must be uint8 [batch, kv_heads, blocks, ", key_channels, "]");
  p.channels = static_cast<const uint8_t*>(kept.data_ptr());
  int64_t record_bytes = pyspec::gear_record_bytes(p.format, p.head_dim);
  return pyspec::encode_blocks(p, k, record_bytes, pyspec_gear_encode_table);
}

std::tuple<Tensor, Tensor> gear(const Tensor& q, const Tensor& quantised, const Tensor& seen, int64_t bits,
                                int64_t group, int64_t rank, int64_t outliers, int64_t key_channels,
                                double scale, const std::optional<Tensor>& oldest) {
  auto p = pyspec::quantised_attention_params<pyspec::GearAttentionParams>(q, quantised);
  p.format = format_of(bits, group, rank, outliers, key_channels, p.head_dim);
  pyspec::set_quantised(p, q, quantised, seen, pyspec::gear_record_bytes(p.format, p.head_dim), scale);
  return pyspec::attend_blocks(p, q, quantised, seen, oldest, pyspec_gear_table,
                               pyspec::gear_workspace_floats);
}

Tensor gear_ragged(const Tensor& q, const Tensor& quantised, const Tensor& k, const Tensor& v,
                   const Tensor& ancestor_bits, const Tensor& seen, const Tensor& starts,
                   const Tensor& prefix_lens, int64_t span, int64_t records, int64_t bits, int64_t group,
                   int64_t rank, int64_t outliers, int64_t key_channels, double scale,
                   std::optional<int64_t> window) {
  pyspec::QuantisedRows rows{q,      quantised,   k,    v,       ancestor_bits, seen,
                             starts, prefix_lens, span, records, window};
  auto p = pyspec::quantised_params<pyspec::GearAttentionParams>(rows, scale);
  p.format = format_of(bits, group, rank, outliers, key_channels, p.head_dim);
  pyspec::check_records(quantised, pyspec::gear_record_bytes(p.format, p.head_dim));
  return pyspec::quantised_attention(p, rows, scale, pyspec_gear_table, pyspec::gear_workspace_floats);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("gear_encode", TORCH_BOX(&gear_encode));
  m.impl("gear_ragged", TORCH_BOX(&gear_ragged));
  m.impl("gear", TORCH_BOX(&gear));
}
