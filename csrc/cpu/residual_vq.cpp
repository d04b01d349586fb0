#include "../residual_vq.h"

#include "quantised_attention.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_residual_vq, pyspec::VqAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_residual_vq_encode, pyspec::VqEncodeParams);

Tensor residual_vq_encode(const Tensor& k, const Tensor& v, const Tensor& codebooks) {
  auto p = pyspec::quantised_encode_params<pyspec::VqEncodeParams>(k, v, pyspec::kVqBlock);
  STD_TORCH_CHECK(k.size(3) == p.head_dim, "v must have the shape of k");
  p.format = pyspec::vq_format_of(codebooks, 5, p.head_dim);
  STD_TORCH_CHECK(codebooks.size(0) == p.batch, "codebooks must have batch ", p.batch);
  p.codebooks = static_cast<const uint16_t*>(codebooks.data_ptr());
  p.codebooks_stride = codebooks.stride(0);
  int64_t record_bytes = pyspec::vq_record_bytes(p.format, p.head_dim);
  return pyspec::encode_blocks(p, k, record_bytes, pyspec_residual_vq_encode_table);
}

std::tuple<Tensor, Tensor> residual_vq(const Tensor& q, const Tensor& quantised, const Tensor& seen,
                                       const Tensor& codebooks, double scale,
                                       const std::optional<Tensor>& rotary,
                                       const std::optional<Tensor>& oldest) {
  auto p = pyspec::vq_attention_params_of(q, quantised, seen, codebooks, scale, rotary);
  return pyspec::attend_blocks(p, q, quantised, seen, oldest, pyspec_residual_vq_table,
                               pyspec::vq_workspace_floats);
}

Tensor residual_vq_ragged(const Tensor& q, const Tensor& quantised, const Tensor& k, const Tensor& v,
                          const Tensor& ancestor_bits, const Tensor& seen, const Tensor& starts,
                          const Tensor& prefix_lens, int64_t span, int64_t records, const Tensor& codebooks,
                          double scale, const std::optional<Tensor>& rotary, std::optional<int64_t> window) {
  pyspec::QuantisedRows rows{q,      quantised,   k,    v,       ancestor_bits, seen,
                             starts, prefix_lens, span, records, window};
  auto p = pyspec::quantised_params<pyspec::VqAttentionParams>(rows, scale);
  pyspec::set_codebooks(p, quantised, codebooks, rotary);
  pyspec::check_records(quantised, pyspec::vq_record_bytes(p.format, p.head_dim));
  return pyspec::quantised_attention(p, rows, scale, pyspec_residual_vq_table, pyspec::vq_workspace_floats);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("residual_vq_encode", TORCH_BOX(&residual_vq_encode));
  m.impl("residual_vq_ragged", TORCH_BOX(&residual_vq_ragged));
  m.impl("residual_vq", TORCH_BOX(&residual_vq));
}
