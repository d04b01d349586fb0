#include "params/lay_out.h"

#include "boundary.h"

namespace {

using pyspec::CodeFormat;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_lay_out, pyspec::LayOutParams);

void check(const pyspec::LayOutParams& p, const Tensor& panels, const Tensor& source) {
  auto byte = torch::headeronly::ScalarType::Byte;
  STD_TORCH_CHECK(panels.scalar_type() == byte && panels.is_contiguous() && source.scalar_type() == byte &&
                      source.is_contiguous(),
                  "panels and source must be uint8 and contiguous");
  const auto q8_0 = static_cast<int32_t>(CodeFormat::kQ8_0);
  const auto int4_32 = static_cast<int32_t>(CodeFormat::kInt4By32);
  const bool is_float = p.kind >= pyspec::kFloat32Rows;
  STD_TORCH_CHECK(
      p.kind >= 0 && p.kind <= pyspec::kBFloat16Rows && (is_float || pyspec::kSourceBytes[p.kind]),
      "kind must be the number of a type of GGUF files or of a float dtype, got ", p.kind);
  STD_TORCH_CHECK(p.format == p.kind || p.format == q8_0 || p.format == int4_32 ||
                      (p.format >= pyspec::kFloat32Rows && p.format <= pyspec::kBFloat16Rows),
                  "format must be the number of the source's own, of q8_0, int4_32 or a float dtype, got ",
                  p.format);
  const int64_t block = is_float ? 1 : pyspec::kCodeShapes[p.kind].block;
  STD_TORCH_CHECK(p.inputs > 0 && p.inputs < int64_t{1} << 31 && p.inputs % block == 0,
                  "inputs must be positive and whole blocks of ", block, ", got ", p.inputs);
  const int64_t row = pyspec::row_bytes(p.kind, p.inputs), panel = pyspec::laid_out_bytes(p.format, p.inputs);
  STD_TORCH_CHECK(source.numel() % row == 0, "source must be rows of ", row, " bytes, got ", source.numel());
  STD_TORCH_CHECK(panels.numel() % panel == 0, "panels must be of ", panel, " bytes each, got ",
                  panels.numel());
  const int64_t outputs = panels.numel() / panel * pyspec::kPanel;
  STD_TORCH_CHECK(p.first >= 0 && p.first <= outputs && p.rows <= outputs - p.first,
                  "panels must have room for ", p.rows, " outputs from ", p.first, " on, they have ",
                  outputs);
}

void lay_out(Tensor panels, int64_t first, int64_t inputs, int64_t format, const Tensor& source, int64_t kind,
             const std::optional<Tensor>& order) {
  pyspec::LayOutParams p{};
  p.first = first, p.inputs = inputs;
  p.kind = static_cast<int32_t>(kind), p.format = static_cast<int32_t>(format);
  check(p, panels, source);
  int64_t source_rows = source.numel() / pyspec::row_bytes(p.kind, inputs);
  p.rows = source_rows;
  std::optional<Tensor> places;
  if (order) {
    STD_TORCH_CHECK(order->dim() == 1 && order->scalar_type() == torch::headeronly::ScalarType::Long,
                    "order must be int64 [rows]");
    places = torch::stable::contiguous(*order);
    p.rows = places->size(0), p.order = static_cast<const int64_t*>(places->data_ptr());
    for (int64_t i = 0; i < p.rows; ++i) {
      STD_TORCH_CHECK(p.order[i] >= 0 && p.order[i] < source_rows, "order must be in [0, ", source_rows,
                      "), got ", p.order[i], " at ", i);
    }
    check(p, panels, source);
  }
  p.source = static_cast<const uint8_t*>(source.data_ptr());
  p.panels = static_cast<uint8_t*>(panels.data_ptr());
  int32_t faults = pyspec::kNone;
  p.faults = &faults, p.parallel_for = pyspec::parallel_for;
  pyspec_lay_out_table[pyspec::instruction_set()](p);
  STD_TORCH_CHECK(faults != pyspec::kNotFinite, "source has values that are NaN or infinite");
  STD_TORCH_CHECK(faults != pyspec::kTooLarge, "source has values that are too large for a scale in fp16");
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("lay_out", TORCH_BOX(&lay_out)); }
