#include "params/rotary_write.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_rotary_write, pyspec::RotaryWriteParams);

// Every slot that the kernel will write must be inside the cache: checked here because the places are data.
void check_places(const pyspec::RotaryWriteParams& p, int64_t table, int64_t batch, int64_t slots) {
  for (int64_t row = 0; row < p.rows; ++row) {
    STD_TORCH_CHECK(p.positions[row] >= 0 && p.positions[row] < table, "positions[", row, "] is ",
                    p.positions[row], ", cos_sin has ", table, " positions");
    STD_TORCH_CHECK(p.sequences[row] >= 0 && p.sequences[row] < batch, "sequences[", row, "] is ",
                    p.sequences[row], ", keys has ", batch, " sequences");
    STD_TORCH_CHECK(p.slots[row] >= 0 && p.slots[row] < slots, "slots[", row, "] is ", p.slots[row],
                    ", keys has ", slots, " slots");
  }
}

Tensor rotary_write(const Tensor& qkv, const Tensor& cos_sin, const Tensor& positions,
                    const Tensor& sequences, const Tensor& slots, Tensor keys, Tensor values, int64_t heads,
                    const std::optional<Tensor>& norm, double epsilon,
                    const std::optional<Tensor>& query_scales, bool norm_values) {
  auto float32 = torch::headeronly::ScalarType::Float, int32 = torch::headeronly::ScalarType::Int;
  STD_TORCH_CHECK(keys.dim() == 4 && values.dim() == 4 && keys.scalar_type() == values.scalar_type(),
                  "keys and values must be [batch, kv_heads, slots, head_dim] of one dtype");
  for (int i = 0; i < 4; ++i)
    STD_TORCH_CHECK(keys.size(i) == values.size(i), "values must have the shape of keys");
  STD_TORCH_CHECK(keys.stride(3) == 1 && values.stride(3) == 1,
                  "keys and values must have a contiguous last dimension");
  pyspec::RotaryWriteParams p{};
  p.element = pyspec::element_of(keys, "keys");
  p.heads = heads, p.kv_heads = keys.size(1), p.head_dim = keys.size(3);
  STD_TORCH_CHECK(p.head_dim % 16 == 0 && p.head_dim <= 512 && heads > 0,
                  "head_dim must be a multiple of 16 up to 512");
  STD_TORCH_CHECK(
      qkv.dim() == 2 && qkv.scalar_type() == float32 && qkv.size(1) == (heads + 2 * p.kv_heads) * p.head_dim,
      "qkv must be float32 [rows, (heads + 2 kv_heads) * head_dim]");
  p.rows = qkv.size(0);
  p.width = cos_sin.dim() == 3 ? 2 * cos_sin.size(2) : 0;
  STD_TORCH_CHECK(p.width > 0 && p.width <= p.head_dim && cos_sin.size(1) == 2 &&
                      cos_sin.scalar_type() == float32 && cos_sin.is_contiguous(),
                  "cos_sin must be float32 [positions, 2, head_dim / 2 at most] and contiguous");
  std::optional<Tensor> norms;
  if (norm) {
    STD_TORCH_CHECK(norm->dim() == 2 && norm->size(1) == p.head_dim && norm->scalar_type() == float32 &&
                        (norm->size(0) == 2 || norm->size(0) == heads + p.kv_heads),
                    "norm must be float32 [2 or heads + kv_heads, head_dim]");
    norms = pyspec::contiguous(*norm, "norm");
    p.norm = static_cast<const float*>(norms->data_ptr()), p.norm_rows = norm->size(0);
  }
  p.epsilon = static_cast<float>(epsilon), p.norms_values = norm_values;
  if (query_scales) {
    STD_TORCH_CHECK(query_scales->dim() == 1 && query_scales->size(0) == cos_sin.size(0) &&
                        query_scales->scalar_type() == float32 && query_scales->is_contiguous(),
                    "query_scales must be float32 [positions] and contiguous");
    p.query_scales = static_cast<const float*>(query_scales->data_ptr());
  }
  STD_TORCH_CHECK(positions.dim() == 1 && positions.size(0) == p.rows && sequences.dim() == 1 &&
                      sequences.size(0) == p.rows && slots.dim() == 1 && slots.size(0) == p.rows &&
                      positions.scalar_type() == int32 && sequences.scalar_type() == int32 &&
                      slots.scalar_type() == int32,
                  "positions, sequences and slots must be int32 [rows]");
  Tensor rows = qkv.stride(1) == 1 ? qkv : pyspec::contiguous(qkv, "qkv");
  Tensor at = pyspec::contiguous(positions, "positions");
  Tensor of = pyspec::contiguous(sequences, "sequences"), to = pyspec::contiguous(slots, "slots");
  Tensor q = pyspec::new_tensor({p.rows, heads, p.head_dim}, keys.scalar_type());
  p.qkv = static_cast<const float*>(rows.data_ptr()), p.qkv_stride = rows.stride(0);
  p.cos_sin = static_cast<const float*>(cos_sin.data_ptr());
  p.positions = static_cast<const int32_t*>(at.data_ptr());
  p.sequences = static_cast<const int32_t*>(of.data_ptr()),
  p.slots = static_cast<const int32_t*>(to.data_ptr());
  p.q = q.data_ptr(), p.k = keys.data_ptr(), p.v = values.data_ptr();
  for (int i = 0; i < 3; ++i) p.k_strides[i] = keys.stride(i), p.v_strides[i] = values.stride(i);
  check_places(p, cos_sin.size(0), keys.size(0), keys.size(2));
  pyspec::launch(pyspec_rotary_write_table, p);
  return q;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("rotary_write", TORCH_BOX(&rotary_write)); }
