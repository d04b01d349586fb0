#include "params/linear_codes.h"

#include "tape.h"

namespace {

using pyspec::CodeFormat;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_linear_codes, pyspec::LinearCodesParams);
PYSPEC_KERNEL_TABLE(pyspec_linear_codes_rows, pyspec::LinearCodesRowsParams);

// The format of a number, after a check that weight is one of that format, outputs and inputs.
CodeFormat checked_format(const Tensor& weight, int64_t outputs, int64_t inputs, int64_t number) {
  CodeFormat format = static_cast<CodeFormat>(number);
  STD_TORCH_CHECK(
      number >= 0 && number < static_cast<int64_t>(CodeFormat::kCount) && format != CodeFormat::kQ8_0,
      "format must be the number of a format that linear_codes reads, got ", number);
  STD_TORCH_CHECK(weight.scalar_type() == torch::headeronly::ScalarType::Byte && weight.is_contiguous() &&
                      weight.numel() > 0 && outputs > 0 && inputs > 0,
                  "weight must be laid out: uint8, contiguous and not empty");
  int64_t panels = (outputs - 1) / pyspec::kPanel + 1, bytes = pyspec::panel_bytes(format, inputs);
  STD_TORCH_CHECK(weight.numel() % bytes == 0 && weight.numel() / bytes == panels,
                  "weight must be laid out for ", outputs, " outputs and ", inputs, " inputs, got ",
                  weight.numel(), " bytes");
  return format;
}

Tensor linear_codes(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs,
                    int64_t format, torch::headeronly::ScalarType out_dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  "x must be [rows, inputs] with a contiguous last dimension");
  pyspec::LinearCodesParams p{};
  p.rows = x.size(0), p.inputs = x.size(1), p.outputs = outputs;
  p.x_element = pyspec::element_of(x, "x"), p.x_stride = x.stride(0);
  p.format = checked_format(weight, outputs, p.inputs, format), p.weight = weight.data_ptr();
  std::optional<Tensor> biases;
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == torch::headeronly::ScalarType::Float && bias->dim() == 1 &&
                        bias->size(0) == outputs,
                    "bias must be float32 [outputs]");
    biases = pyspec::contiguous(*bias, "bias");
    p.bias = static_cast<const float*>(biases->data_ptr());
  }
  Tensor out = pyspec::new_tensor({p.rows, outputs}, out_dtype);
  p.out_element = pyspec::element_of(out, "out");
  p.x = x.data_ptr(), p.out = out.data_ptr(), p.out_stride = outputs;
  p.workspace = pyspec::scratch((pyspec::workspace_bytes(p) + 3) / 4);
  if (p.rows * outputs > 0) pyspec::launch(pyspec_linear_codes_table, p);
  return out;
}

Tensor linear_codes_rows(const Tensor& index, const Tensor& weight, int64_t outputs, int64_t inputs,
                         int64_t format) {
  STD_TORCH_CHECK(index.dim() == 1 && index.scalar_type() == torch::headeronly::ScalarType::Long,
                  "index must be int64 [rows]");
  CodeFormat checked = checked_format(weight, outputs, inputs, format);
  Tensor rows = torch::stable::contiguous(index);
  auto places = static_cast<const int64_t*>(rows.data_ptr());
  for (int64_t i = 0; i < rows.size(0); ++i) {
    STD_TORCH_CHECK(places[i] >= 0 && places[i] < outputs, "index must be in [0, ", outputs, "), got ",
                    places[i], " at ", i);
  }
  Tensor out = torch::stable::new_empty(rows, {rows.size(0), inputs}, torch::headeronly::ScalarType::Float);
  pyspec_linear_codes_rows_table[pyspec::instruction_set()](
      {weight.data_ptr(), places, static_cast<float*>(out.data_ptr()), rows.size(0), inputs, checked});
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("linear_codes", TORCH_BOX(&linear_codes));
  m.impl("linear_codes_rows", TORCH_BOX(&linear_codes_rows));
}
