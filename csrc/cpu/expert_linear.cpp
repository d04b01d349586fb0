#include "params/expert_linear.h"

#include "params/linear_codes.h"
#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_linear, pyspec::LinearParams);
PYSPEC_KERNEL_TABLE(pyspec_linear_codes, pyspec::LinearCodesParams);

// The experts that rows chose. While a tape records, ids are yet to be computed; then kernels leave out rows
// whose expert there is not.
pyspec::Experts experts_of(const Tensor& x, const Tensor& ids, int64_t count) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  "x must be [rows, inputs] with a contiguous last dimension");
  pyspec::Experts experts{pyspec::int32s_of(ids, 2, "ids"), count, ids.size(1)};
  STD_TORCH_CHECK(ids.size(0) == x.size(0) && ids.size(1) > 0, "ids must be [", x.size(0), ", choices]");
  STD_TORCH_CHECK(count > 0 && count < int64_t{1} << 31 && ids.numel() < int64_t{1} << 31,
                  "experts and choices must be positive and below 2^31");
  for (int64_t i = 0; !pyspec::Tape::recording() && i < ids.numel(); ++i) {
    STD_TORCH_CHECK(experts.ids[i] >= 0 && experts.ids[i] < count, "ids[", i / experts.choices, "][",
                    i % experts.choices, "] is ", experts.ids[i], ", there are ", count, " experts");
  }
  return experts;
}

// Params of either kernel but for the weight, and the launch.
template <class Params>
Tensor run(const pyspec::KernelTable<Params>& table, Params& p, const Tensor& x, const Tensor& ids,
           const std::optional<Tensor>& bias, torch::headeronly::ScalarType out_dtype) {
  p.rows = ids.numel(), p.x_element = pyspec::element_of(x, "x"), p.x_stride = x.stride(0);
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == torch::headeronly::ScalarType::Float && bias->dim() == 2 &&
                        bias->size(0) == p.experts.count && bias->size(1) == p.outputs &&
                        bias->is_contiguous(),
                    "bias must be float32 [experts, outputs] and contiguous");
    p.bias = static_cast<const float*>(bias->data_ptr());
  }
  Tensor out = pyspec::new_tensor({p.rows, p.outputs}, out_dtype);
  p.out_element = pyspec::element_of(out, "out");
  p.x = x.data_ptr(), p.out = out.data_ptr(), p.out_stride = p.outputs;
  p.workspace = pyspec::scratch((pyspec::workspace_bytes(p) + 3) / 4);
  if (p.rows > 0) pyspec::launch(table, p);
  return out;
}

Tensor expert_linear(const Tensor& x, const Tensor& ids, const Tensor& weight,
                     const std::optional<Tensor>& bias, int64_t outputs, int64_t experts, int64_t format,
                     torch::headeronly::ScalarType out_dtype) {
  pyspec::Experts chosen = experts_of(x, ids, experts);
  STD_TORCH_CHECK(outputs > 0 && outputs < int64_t{1} << 31 && x.size(1) > 0, "weight must not be empty");
  int64_t panels = experts * pyspec::panels(outputs);
  if (format < 0) {
    pyspec::LinearParams p{};
    p.experts = chosen, p.inputs = x.size(1), p.outputs = panels * pyspec::kPanel;
    pyspec::set_weight(p, weight);
    STD_TORCH_CHECK(p.format == pyspec::WeightFormat::kInt8 || p.format == pyspec::WeightFormat::kFloat32 ||
                        weight.scalar_type() == x.scalar_type(),
                    "weight must be int8 or float32 or have the dtype of x");
    p.outputs = outputs;
    return run(pyspec_linear_table, p, x, ids, bias, out_dtype);
  }
  STD_TORCH_CHECK(format < static_cast<int64_t>(pyspec::CodeFormat::kCount),
                  "format must be the number of a format that linear_codes reads, got ", format);
  pyspec::LinearCodesParams p{};
  p.experts = chosen, p.inputs = x.size(1), p.outputs = outputs;
  p.format = static_cast<pyspec::CodeFormat>(format), p.weight = weight.data_ptr();
  int64_t expected = panels * pyspec::panel_bytes(p.format, p.inputs);
  STD_TORCH_CHECK(weight.scalar_type() == torch::headeronly::ScalarType::Byte && weight.is_contiguous() &&
                      weight.numel() == expected,
                  "weight must be laid out for these experts, outputs and inputs, which takes ", expected,
                  " bytes, got ", weight.numel());
  return run(pyspec_linear_codes_table, p, x, ids, bias, out_dtype);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("expert_linear", TORCH_BOX(&expert_linear)); }
