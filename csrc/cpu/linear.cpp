#include "params/linear.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_linear, pyspec::LinearParams);
PYSPEC_KERNEL_TABLE(pyspec_linear_rows, pyspec::LinearRowsParams);

Tensor linear(const Tensor& x, const Tensor& weight, const std::optional<Tensor>& bias, int64_t outputs,
              torch::headeronly::ScalarType out_dtype) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  "x must be [rows, inputs] with a contiguous last dimension");
  pyspec::LinearParams p{};
  p.rows = x.size(0), p.inputs = x.size(1), p.outputs = outputs;
  p.x_element = pyspec::element_of(x, "x"), p.x_stride = x.stride(0);
  pyspec::set_weight(p, weight);
  STD_TORCH_CHECK(p.format == pyspec::WeightFormat::kInt8 || p.format == pyspec::WeightFormat::kFloat32 ||
                      weight.scalar_type() == x.scalar_type(),
                  "weight must be int8 or float32 or have the dtype of x");
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
  if (p.rows * outputs > 0) pyspec::launch(pyspec_linear_table, p);
  return out;
}

Tensor linear_rows(const Tensor& index, const Tensor& weight, int64_t outputs, int64_t inputs) {
  pyspec::LinearParams of_weight{};
  of_weight.inputs = inputs, of_weight.outputs = outputs;
  pyspec::set_weight(of_weight, weight);
  pyspec::LinearRowsParams p{};
  p.weight = of_weight.weight, p.format = of_weight.format, p.inputs = inputs;
  return pyspec::launch_rows(pyspec_linear_rows_table, p, index, outputs);
}

}  // namespace

void pyspec::set_weight(LinearParams& p, const Tensor& weight) {
  switch (weight.scalar_type()) {
    case torch::headeronly::ScalarType::Float:
      p.format = WeightFormat::kFloat32;
      break;
    case torch::headeronly::ScalarType::Half:
      p.format = WeightFormat::kFloat16;
      break;
    case torch::headeronly::ScalarType::BFloat16:
      p.format = WeightFormat::kBFloat16;
      break;
    case torch::headeronly::ScalarType::Byte:
      p.format = WeightFormat::kInt8;
      break;
    default:
      STD_TORCH_CHECK(false, "weight must be laid out: float32, float16, bfloat16 or uint8 (of int8)");
  }
  STD_TORCH_CHECK(weight.is_contiguous() && p.outputs > 0 && p.inputs > 0,
                  "weight must be contiguous and not empty");
  int64_t bytes = weight.numel() * weight.element_size(),
          expected = panels(p.outputs) * panel_bytes(p.format, p.inputs);
  STD_TORCH_CHECK(bytes == expected, "weight must be laid out for ", p.outputs, " outputs and ", p.inputs,
                  " inputs, which takes ", expected, " bytes, got ", bytes);
  p.weight = weight.data_ptr();
}

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("linear", TORCH_BOX(&linear));
  m.impl("linear_rows", TORCH_BOX(&linear_rows));
}
