#include "params/merge_attention.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_merge_attention, pyspec::MergeAttentionParams);

std::tuple<Tensor, Tensor> merge_attention(const Tensor& out_a, const Tensor& lse_a, const Tensor& out_b,
                                           const Tensor& lse_b) {
  auto float32 = torch::headeronly::ScalarType::Float;
  pyspec::MergeAttentionParams p{};
  p.element = pyspec::element_of(out_a, "out_a");
  STD_TORCH_CHECK(out_a.dim() > 0 && out_b.dim() == out_a.dim() && out_b.scalar_type() == out_a.scalar_type(),
                  "out_b must have the shape and dtype of out_a");
  p.head_dim = out_a.size(-1);
  p.rows = p.head_dim ? out_a.numel() / p.head_dim : 0;
  for (int64_t i = 0; i < out_a.dim(); ++i)
    STD_TORCH_CHECK(out_b.size(i) == out_a.size(i), "out_b must be like out_a");
  STD_TORCH_CHECK(lse_a.scalar_type() == float32 && lse_b.scalar_type() == float32 &&
                      lse_a.numel() == p.rows && lse_b.numel() == p.rows,
                  "lse_a and lse_b must be float32 and have one value for each row of out_a");
  Tensor a = torch::stable::contiguous(out_a), b = torch::stable::contiguous(out_b);
  Tensor a_lse = torch::stable::contiguous(lse_a), b_lse = torch::stable::contiguous(lse_b);
  Tensor out = torch::stable::empty_like(a), lse = torch::stable::empty_like(a_lse);
  p.out_a = a.data_ptr(), p.out_b = b.data_ptr(), p.out = out.data_ptr();
  p.lse_a = static_cast<const float*>(a_lse.data_ptr()),
  p.lse_b = static_cast<const float*>(b_lse.data_ptr());
  p.lse = static_cast<float*>(lse.data_ptr());
  pyspec::launch(pyspec_merge_attention_table, p);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("merge_attention", TORCH_BOX(&merge_attention)); }
