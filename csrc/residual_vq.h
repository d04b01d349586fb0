// The tensors of residual_vq as params, but for `seen`, the results and the workspace: shapes and dtypes are
// checked, on any device.
#pragma once

#include <optional>

#include "params/residual_vq.h"
#include "quantised.h"

namespace pyspec {

// Of codebooks whose last four dimensions are [2, depth, codes, 32].
inline VqFormat vq_format_of(const torch::stable::Tensor& codebooks, int64_t dims, int64_t head_dim) {
  STD_TORCH_CHECK(codebooks.scalar_type() == torch::headeronly::ScalarType::Half && codebooks.dim() == dims,
                  "codebooks must be float16 of ", dims, " dimensions");
  int64_t depth = codebooks.size(dims - 3), codes = codebooks.size(dims - 2);
  STD_TORCH_CHECK(codebooks.size(dims - 4) == 2 && depth >= 1 && depth <= kVqMostDepth &&
                      (codes == 256 || codes == 2048) && codebooks.size(dims - 1) == kVqWidth,
                  "codebooks must be [2, depth up to ", kVqMostDepth, ", 256 or 2048, ", kVqWidth, "]");
  int64_t stride = 1;
  for (int64_t i = dims - 1; i >= dims - 4; stride *= codebooks.size(i--))
    STD_TORCH_CHECK(codebooks.stride(i) == stride, "codebooks must be contiguous");
  STD_TORCH_CHECK(head_dim % kVqWidth == 0 && head_dim >= 64 && head_dim <= 256,
                  "the head_dim must be a multiple of 32 from 64 to 256, got ", head_dim);
  return {depth, codes};
}

// The format, the codebooks and the turns of keys, for a q of p.head_dim.
inline void set_codebooks(VqAttentionParams& p, const torch::stable::Tensor& quantised,
                          const torch::stable::Tensor& codebooks,
                          const std::optional<torch::stable::Tensor>& rotary) {
  p.format = vq_format_of(codebooks, 4, p.head_dim);
  p.codebooks = static_cast<const uint16_t*>(codebooks.data_ptr());
  if (!rotary) return;
  STD_TORCH_CHECK(rotary->scalar_type() == torch::headeronly::ScalarType::Float && rotary->dim() == 3 &&
                      rotary->size(0) >= kVqBlock + quantised.size(2) && rotary->size(1) == 2 &&
                      rotary->size(2) == p.head_dim / 2 && rotary->is_contiguous(),
                  "rotary must be contiguous float32 [", kVqBlock, " + blocks, 2, head_dim / 2] for ",
                  quantised.size(2), " blocks");
  p.rotary = static_cast<const float*>(rotary->data_ptr());
}

inline VqAttentionParams vq_attention_params_of(const torch::stable::Tensor& q,
                                                const torch::stable::Tensor& quantised,
                                                const torch::stable::Tensor& seen,
                                                const torch::stable::Tensor& codebooks, double scale,
                                                const std::optional<torch::stable::Tensor>& rotary) {
  auto p = quantised_attention_params<VqAttentionParams>(q, quantised);
  set_codebooks(p, quantised, codebooks, rotary);
  set_quantised(p, q, quantised, seen, vq_record_bytes(p.format, p.head_dim), scale);
  return p;
}

}  // namespace pyspec
