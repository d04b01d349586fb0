#include "params/linear_codes.h"

#include <vector>

#include "tape.h"

namespace {

using pyspec::CodeFormat;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_linear_codes, pyspec::LinearCodesParams);
PYSPEC_KERNEL_TABLE(pyspec_linear_codes_rows, pyspec::LinearCodesRowsParams);

// The format of a number.
CodeFormat format_of(int64_t number) {
  STD_TORCH_CHECK(number >= 0 && number < static_cast<int64_t>(CodeFormat::kCount),
                  "format must be the number of a format that linear_codes reads, got ", number);
  return static_cast<CodeFormat>(number);
}

// Bytes of a weight's panels.
int64_t weight_bytes(CodeFormat format, int64_t outputs, int64_t inputs) {
  STD_TORCH_CHECK(outputs > 0 && inputs > 0 && outputs < int64_t{1} << 31 && inputs < int64_t{1} << 31,
                  "outputs and inputs must be positive and below 2^31, got ", outputs, " and ", inputs);
  return pyspec::panels(outputs) * pyspec::panel_bytes(format, inputs);
}

void check_bytes(const Tensor& weight, int64_t expected) {
  STD_TORCH_CHECK(weight.scalar_type() == torch::headeronly::ScalarType::Byte && weight.is_contiguous(),
                  "weight must be laid out: uint8 and contiguous");
  STD_TORCH_CHECK(weight.numel() == expected,
                  "weight must be laid out for these outputs and inputs, which takes ", expected,
                  " bytes, got ", weight.numel());
}

// Weights of several formats, one below another: a launch for each, into its columns of out.
Tensor linear_joined(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias,
                     std::vector<int64_t> outputs, std::vector<int64_t> formats,
                     torch::headeronly::ScalarType out_dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  "x must be [rows, inputs] with a contiguous last dimension");
  STD_TORCH_CHECK(outputs.size() == formats.size(), "outputs and formats must be as many, got ",
                  outputs.size(), " and ", formats.size());
  pyspec::LinearCodesParams p{};
  p.rows = x.size(0), p.inputs = x.size(1);
  p.x_element = pyspec::element_of(x, "x"), p.x_stride = x.stride(0), p.x = x.data_ptr();
  int64_t total = 0, bytes = 0;
  for (size_t i = 0; i < outputs.size(); ++i) {
    bytes += weight_bytes(format_of(formats[i]), outputs[i], p.inputs);
    total += outputs[i];
  }
  check_bytes(weight, bytes);
  std::optional<Tensor> biases;
  if (bias) {
    STD_TORCH_CHECK(bias->scalar_type() == torch::headeronly::ScalarType::Float && bias->dim() == 1 &&
                        bias->size(0) == total,
                    "bias must be float32 [outputs]");
    biases = pyspec::contiguous(*bias, "bias");
    p.bias = static_cast<const float*>(biases->data_ptr());
  }
  Tensor out = pyspec::new_tensor({p.rows, total}, out_dtype);
  p.out_element = pyspec::element_of(out, "out"), p.out_stride = total;
  const char* panels = static_cast<const char*>(weight.data_ptr());
  char* columns = static_cast<char*>(out.data_ptr());
  for (size_t i = 0; i < outputs.size(); ++i) {
    p.format = format_of(formats[i]), p.outputs = outputs[i], p.weight = panels, p.out = columns;
    p.workspace = pyspec::scratch((pyspec::workspace_bytes(p) + 3) / 4);
    if (p.rows > 0) pyspec::launch(pyspec_linear_codes_table, p);
    panels += weight_bytes(p.format, p.outputs, p.inputs);
    columns += p.outputs * pyspec::bytes_of(p.out_element);
    if (p.bias) p.bias += p.outputs;
  }
  return out;
}

Tensor linear_codes(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs,
                    int64_t format, torch::headeronly::ScalarType out_dtype) {
  return linear_joined(x, weight, bias, {outputs}, {format}, out_dtype);
}

Tensor linear_codes_rows(const Tensor& index, const Tensor& weight, int64_t outputs, int64_t inputs,
                         int64_t format) {
  pyspec::LinearCodesRowsParams p{};
  p.format = format_of(format), p.inputs = inputs;
  check_bytes(weight, weight_bytes(p.format, outputs, inputs));
  p.weight = weight.data_ptr();
  return pyspec::launch_rows(pyspec_linear_codes_rows_table, p, index, outputs);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("linear_codes", TORCH_BOX(&linear_codes));
  m.impl("linear_joined", TORCH_BOX(&linear_joined));
  m.impl("linear_codes_rows", TORCH_BOX(&linear_codes_rows));
}
