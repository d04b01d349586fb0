#include "params/row_statistics.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_row_statistics, pyspec::RowStatisticsParams);

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor> row_statistics(const Tensor& logits,
                                                                  const std::optional<Tensor>& tokens) {
  auto float32 = torch::headeronly::ScalarType::Float, int64 = torch::headeronly::ScalarType::Long;
  STD_TORCH_CHECK(logits.dim() == 2 && logits.size(1) > 0 && (logits.stride(1) == 1 || logits.size(1) == 1),
                  "logits must be [rows, vocabulary], not empty, with a contiguous last dimension");
  pyspec::RowStatisticsParams p{};
  p.element = pyspec::element_of(logits, "logits");
  p.rows = logits.size(0), p.vocab = logits.size(1), p.stride = logits.stride(0);
  p.logits = logits.data_ptr();
  std::optional<Tensor> wanted;
  if (tokens) {
    STD_TORCH_CHECK(tokens->scalar_type() == int64 && tokens->dim() == 2 && tokens->size(0) == p.rows,
                    "tokens must be int64 [rows, M] with the rows of logits");
    wanted = pyspec::contiguous(*tokens, "tokens");
    p.tokens = static_cast<const int64_t*>(wanted->data_ptr());
    p.count = wanted->size(1);
  }
  Tensor top_tokens = pyspec::new_tensor({p.rows, pyspec::kTop}, int64);
  Tensor top_logits = pyspec::new_tensor({p.rows, pyspec::kTop}, float32);
  Tensor log_sum_exp = pyspec::new_tensor({p.rows}, float32);
  Tensor entropy = pyspec::new_tensor({p.rows}, float32);
  Tensor probabilities = pyspec::new_tensor({p.rows, p.count}, float32);
  p.top_tokens = static_cast<int64_t*>(top_tokens.data_ptr());
  p.top_logits = static_cast<float*>(top_logits.data_ptr());
  p.log_sum_exp = static_cast<float*>(log_sum_exp.data_ptr());
  p.entropy = static_cast<float*>(entropy.data_ptr());
  p.token_probabilities = static_cast<float*>(probabilities.data_ptr());
  pyspec::launch(pyspec_row_statistics_table, p);
  return {top_tokens, top_logits, log_sum_exp, entropy, probabilities};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("row_statistics", TORCH_BOX(&row_statistics)); }
