#include "params/block_masked_attention.h"

#include "boundary.h"

namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_block_masked_attention, pyspec::BlockMaskedAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_block_masked_attention_backward, pyspec::BlockMaskedAttentionBackwardParams);

// The data of an int32 (or int64) tensor that must be contiguous.
template <class T>
const T* list_of(const Tensor& tensor, const char* name, int64_t dimensions) {
  ScalarType type = sizeof(T) == 4 ? ScalarType::Int : ScalarType::Long;
  STD_TORCH_CHECK(tensor.scalar_type() == type && tensor.dim() == dimensions && tensor.is_contiguous(), name,
                  " must be ", sizeof(T) == 4 ? "int32" : "int64", ", contiguous and of ", dimensions,
                  " dimensions");
  return static_cast<const T*>(tensor.data_ptr());
}

void check_within(const int32_t* values, int64_t count, int64_t step, int64_t end, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    STD_TORCH_CHECK(values[i * step] >= 0 && values[i * step] < end, name, " must name one of ", end,
                    ", got ", values[i * step]);
  }
}

void check_ranges(const int32_t* ranges, int64_t count, int64_t end, const char* name) {
  for (int64_t i = 0; i < count; ++i) {
    int64_t first = ranges[2 * i], last = ranges[2 * i + 1];
    STD_TORCH_CHECK(first >= 0 && first <= last && last <= end, name, " must be within a list of ", end,
                    ", got ", first, " to ", last);
  }
}

const int32_t* order_of(const std::optional<Tensor>& order, int64_t batch, int64_t count, const char* name) {
  if (!order) return nullptr;
  const int32_t* data = list_of<int32_t>(*order, name, 2);
  STD_TORCH_CHECK(order->size(0) == batch && order->size(1) == count, name, " must be [", batch, ", ", count,
                  "]");
  check_within(data, batch * count, 1, count, name);
  return data;
}

void set_strides(int64_t (&strides)[3], const Tensor& tensor) {
  for (int i = 0; i < 3; ++i) strides[i] = tensor.stride(i);
}

// What both directions read, checked; out and lse are left to be set.
void set_inputs(pyspec::BlockMaskedAttentionParams& p, const Tensor& q, const Tensor& k, const Tensor& v,
                const Tensor& full_ranges, const Tensor& full_tiles, const Tensor& partial_ranges,
                const Tensor& partial_tiles, const Tensor& bits, const std::optional<Tensor>& row_order,
                const std::optional<Tensor>& key_order, double scale, std::optional<double> softcap) {
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have 4 dimensions");
  p.element = pyspec::element_of(q, "q");
  p.batch = q.size(0), p.heads = q.size(1), p.rows = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = k.size(1), p.keys = k.size(2);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  STD_TORCH_CHECK(p.head_dim % 16 == 0 && p.head_dim > 0 && p.head_dim <= pyspec::kMaxHeadDim,
                  "q must have a head_dim of at most 256 that is a multiple of 16, got ", p.head_dim);
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == v.size(i), "v must have the shape of k");
  STD_TORCH_CHECK(k.size(0) == p.batch && k.size(3) == p.head_dim, "k must have the batch and head_dim of q");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                  "k must have a number of heads that divides q's");
  STD_TORCH_CHECK(q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1,
                  "q, k and v must have a contiguous last dimension");
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);

  p.full_ranges = list_of<int32_t>(full_ranges, "full_ranges", 4);
  p.full_tiles = list_of<int32_t>(full_tiles, "full_tiles", 1);
  p.partial_ranges = list_of<int32_t>(partial_ranges, "partial_ranges", 4);
  p.partial_tiles = list_of<int32_t>(partial_tiles, "partial_tiles", 2);
  p.bits = reinterpret_cast<const uint64_t*>(list_of<int64_t>(bits, "bits", 3));
  p.mask_batch = full_ranges.size(0), p.mask_heads = full_ranges.size(1), p.blocks = full_ranges.size(2);
  p.words = bits.size(1);
  STD_TORCH_CHECK(p.words >= 1 && p.words <= 4 && bits.size(2) == pyspec::kTile,
                  "bits must be [tiles, 1 to 4, 64]");
  STD_TORCH_CHECK((p.mask_batch == 1 || p.mask_batch == p.batch) &&
                      (p.mask_heads == 1 || p.mask_heads == p.heads) && full_ranges.size(3) == 2 &&
                      p.blocks == pyspec::ceil_div(p.rows, pyspec::kTile * p.words),
                  "full_ranges must be [1 or batch, 1 or heads, row blocks, 2]");
  for (int i = 0; i < 4; ++i) {
    STD_TORCH_CHECK(partial_ranges.size(i) == full_ranges.size(i),
                    "partial_ranges must have the shape of full_ranges");
  }
  STD_TORCH_CHECK(partial_tiles.size(1) == 2, "partial_tiles must be [tiles, 2]");
  int64_t lists = p.mask_batch * p.mask_heads * p.blocks, tiles = pyspec::ceil_div(p.keys, pyspec::kTile);
  check_ranges(p.full_ranges, lists, full_tiles.size(0), "full_ranges");
  check_ranges(p.partial_ranges, lists, partial_tiles.size(0), "partial_ranges");
  check_within(p.full_tiles, full_tiles.size(0), 1, tiles, "full_tiles");
  check_within(p.partial_tiles, partial_tiles.size(0), 2, tiles, "partial_tiles");
  check_within(p.partial_tiles + 1, partial_tiles.size(0), 2, bits.size(0), "partial_tiles");
  p.row_order = order_of(row_order, p.mask_batch, p.rows, "row_order");
  p.key_order = order_of(key_order, p.mask_batch, p.keys, "key_order");

  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr();
  set_strides(p.q_strides, q), set_strides(p.k_strides, k), set_strides(p.v_strides, v);
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap.value_or(0.0));
  p.parallel_for = pyspec::parallel_for;
}

// A new tensor like one of the inputs, named for the message.
Tensor result_like(const Tensor& input, const char* name) {
  Tensor result = torch::stable::empty_like(input);
  STD_TORCH_CHECK(result.stride(3) == 1, name, " must have strides that empty_like keeps");
  return result;
}

std::tuple<Tensor, Tensor> block_masked_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                                  const Tensor& full_ranges, const Tensor& full_tiles,
                                                  const Tensor& partial_ranges, const Tensor& partial_tiles,
                                                  const Tensor& bits, std::optional<Tensor> row_order,
                                                  std::optional<Tensor> key_order, double scale,
                                                  std::optional<double> softcap) {
  pyspec::BlockMaskedAttentionParams p{};
  set_inputs(p, q, k, v, full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order,
             scale, softcap);
  Tensor out = result_like(q, "q");
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.rows}, ScalarType::Float);
  p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
  set_strides(p.out_strides, out);
  if (p.batch * p.heads * p.rows > 0) pyspec_block_masked_attention_table[pyspec::instruction_set()](p);
  return {out, lse};
}

// A number for each row, as the forward's lse is.
void check_of_rows(const Tensor& tensor, const Tensor& q, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == ScalarType::Float && tensor.dim() == 3, name,
                  " must be float32 and have 3 dimensions");
  for (int i = 0; i < 3; ++i)
    STD_TORCH_CHECK(tensor.size(i) == q.size(i), name, " must have the shape of lse");
}

std::tuple<Tensor, Tensor, Tensor> block_masked_attention_backward(
    const Tensor& d_out, std::optional<Tensor> d_lse, const Tensor& q, const Tensor& k, const Tensor& v,
    const Tensor& out, const Tensor& lse, const Tensor& full_ranges, const Tensor& full_tiles,
    const Tensor& partial_ranges, const Tensor& partial_tiles, const Tensor& bits,
    std::optional<Tensor> row_order, std::optional<Tensor> key_order, double scale,
    std::optional<double> softcap) {
  pyspec::BlockMaskedAttentionBackwardParams p{};
  set_inputs(p, q, k, v, full_ranges, full_tiles, partial_ranges, partial_tiles, bits, row_order, key_order,
             scale, softcap);
  for (auto [tensor, name] : {std::pair(&d_out, "d_out"), std::pair(&out, "out")}) {
    STD_TORCH_CHECK(tensor->scalar_type() == q.scalar_type() && tensor->dim() == 4, name,
                    " must be 4-dimensional and of q's dtype");
    for (int i = 0; i < 4; ++i)
      STD_TORCH_CHECK(tensor->size(i) == q.size(i), name, " must have the shape of q");
  }
  STD_TORCH_CHECK(out.stride(3) == 1, "out must have a contiguous last dimension");
  check_of_rows(lse, q, "lse");
  STD_TORCH_CHECK(lse.is_contiguous(), "lse must be contiguous");
  if (d_lse) check_of_rows(*d_lse, q, "d_lse");
  // What autograd brings may be a number for all.
  Tensor d_rows = d_out.stride(3) == 1 ? d_out : torch::stable::contiguous(d_out);
  if (d_lse) d_lse = torch::stable::contiguous(*d_lse);

  Tensor dq = result_like(q, "q"), dk = result_like(k, "k"), dv = result_like(v, "v");
  const int64_t sequence_heads = p.batch * p.kv_heads, tiles = pyspec::ceil_div(p.keys, pyspec::kTile);
  p.segments = sequence_heads ? pyspec::backward_segments(sequence_heads, p.blocks) : 0;
  const int64_t parts = sequence_heads * p.segments * tiles;
  const int64_t floats = parts * 2 * pyspec::kTile * p.head_dim;
  p.sums = pyspec::workspace(floats + pyspec::ceil_div(parts, 4));
  p.visited = reinterpret_cast<uint8_t*>(p.sums + floats);
  p.d_out = d_rows.data_ptr(), p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
  p.d_lse = d_lse ? static_cast<const float*>(d_lse->data_ptr()) : nullptr;
  p.dq = dq.data_ptr(), p.dk = dk.data_ptr(), p.dv = dv.data_ptr();
  set_strides(p.d_out_strides, d_rows), set_strides(p.out_strides, out), set_strides(p.dq_strides, dq);
  set_strides(p.dk_strides, dk), set_strides(p.dv_strides, dv);
  if (sequence_heads > 0) pyspec_block_masked_attention_backward_table[pyspec::instruction_set()](p);
  return {dq, dk, dv};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) {
  m.impl("block_masked_attention", TORCH_BOX(&block_masked_attention));
  m.impl("block_masked_attention_backward", TORCH_BOX(&block_masked_attention_backward));
}
