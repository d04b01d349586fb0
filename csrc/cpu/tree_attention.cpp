#include "params/tree_attention.h"

#include "boundary.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_tree_attention, pyspec::TreeAttentionParams);

// Every slot that the kernel will read must be inside k: checked here because the lengths are data.
void check_reach(const pyspec::TreeAttentionParams& p, int64_t pages, int64_t slots) {
  const int64_t words = p.words;
  for (int64_t b = 0; b < p.batch; ++b) {
    const int32_t* bits = p.ancestor_bits + b * p.nodes * words;
    int64_t reach = 0;  // 1 + the largest node that any row names
    for (int64_t w = words - 1; w >= 0 && reach == 0; --w) {
      uint32_t any = 0;
      for (int64_t node = 0; node < p.nodes; ++node) any |= static_cast<uint32_t>(bits[node * words + w]);
      if (any) reach = w * 32 + 32 - __builtin_clz(any);
    }
    int64_t n = p.prefix_lens[b];
    STD_TORCH_CHECK(n >= 0, "prefix_lens[", b, "] must not be negative, got ", n);
    STD_TORCH_CHECK(n + reach <= slots, "prefix_lens[", b, "] is ", n, " and ancestor_bits name node ",
                    reach - 1, ", but k has only ", slots, " slots");
    if (!p.block_table) continue;
    for (int64_t page = 0; page * p.page < n + reach; ++page) {
      int64_t index = p.block_table[b * p.block_table_stride + page];
      STD_TORCH_CHECK(index >= 0 && index < pages, "block_table[", b, "][", page, "] is ", index, ", k has ",
                      pages, " pages");
    }
  }
}

std::tuple<Tensor, Tensor> tree_attention(const Tensor& q, const Tensor& k, const Tensor& v,
                                          const Tensor& ancestor_bits, const Tensor& prefix_lens,
                                          double scale, std::optional<double> softcap,
                                          std::optional<int64_t> window, std::optional<Tensor> block_table,
                                          const std::optional<Tensor>& sinks, bool chunked) {
  auto int32 = torch::headeronly::ScalarType::Int;
  STD_TORCH_CHECK(q.dim() == 4 && k.dim() == 4 && v.dim() == 4, "q, k and v must have 4 dimensions");
  pyspec::TreeAttentionParams p{};
  p.element = pyspec::element_of(q, "q");
  p.batch = q.size(0), p.heads = q.size(1), p.nodes = q.size(2), p.head_dim = q.size(3),
  p.kv_heads = k.size(1);
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  STD_TORCH_CHECK(p.head_dim % 16 == 0 && p.head_dim > 0 && p.head_dim <= pyspec::kMaxHeadDim,
                  "q must have a head_dim of at most 512 "
                  "that is a multiple of 16, got ",
                  p.head_dim);
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == v.size(i), "v must have the shape of k");
  STD_TORCH_CHECK(k.size(3) == p.head_dim, "k must have the head_dim of q");
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                  "k must have a number of heads that divides q's");
  STD_TORCH_CHECK(q.stride(3) == 1 && k.stride(3) == 1 && v.stride(3) == 1,
                  "q, k and v must have a contiguous last dimension");
  STD_TORCH_CHECK(ancestor_bits.scalar_type() == int32 && ancestor_bits.dim() == 3 &&
                      ancestor_bits.size(0) == p.batch && ancestor_bits.size(1) == p.nodes &&
                      ancestor_bits.size(2) >= (p.nodes + 31) / 32,
                  "ancestor_bits must be int32 [batch, nodes, at least ceil(nodes / 32)]");
  p.words = ancestor_bits.size(2);
  STD_TORCH_CHECK(
      prefix_lens.scalar_type() == int32 && prefix_lens.dim() == 1 && prefix_lens.size(0) == p.batch,
      "prefix_lens must be int32 [batch]");
  STD_TORCH_CHECK(block_table || k.size(0) == p.batch, "k must have the batch of q");
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);

  Tensor bits = torch::stable::contiguous(ancestor_bits), lengths = torch::stable::contiguous(prefix_lens);
  Tensor out = torch::stable::empty_like(q);
  Tensor lse = torch::stable::new_empty(q, {p.batch, p.heads, p.nodes}, torch::headeronly::ScalarType::Float);
  STD_TORCH_CHECK(out.stride(3) == 1 || p.head_dim == 1, "q must have strides that empty_like keeps");
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.out = out.data_ptr();
  p.ancestor_bits = static_cast<const int32_t*>(bits.data_ptr());
  p.prefix_lens = static_cast<const int32_t*>(lengths.data_ptr());
  p.lse = static_cast<float*>(lse.data_ptr());
  pyspec::copy_strides(q, p.q_strides), pyspec::copy_strides(out, p.out_strides);
  pyspec::copy_strides(k, p.k_strides), pyspec::copy_strides(v, p.v_strides);
  if (sinks) p.sinks = pyspec::sinks_of(*sinks, p.heads);
  p.page = k.size(2);
  int64_t slots = k.size(2);
  std::optional<Tensor> table;
  if (block_table) {
    STD_TORCH_CHECK(
        block_table->scalar_type() == int32 && block_table->dim() == 2 && block_table->size(0) == p.batch,
        "block_table must be int32 [batch, pages]");
    table = torch::stable::contiguous(*block_table);
    p.block_table = static_cast<const int32_t*>(table->data_ptr());
    p.block_table_stride = table->size(1);
    slots = table->size(1) * p.page;
  }
  p.scale = static_cast<float>(scale);
  p.softcap = static_cast<float>(softcap.value_or(0.0));
  p.window = window.value_or(0), p.chunked = chunked && window;
  p.parallel_for = pyspec::parallel_for;
  check_reach(p, k.size(0), slots);
  for (int64_t b = 0; b < p.batch; ++b) {
    if (p.prefix_lens[b] > p.longest_prefix) p.longest_prefix = p.prefix_lens[b];
  }
  p.workspace = pyspec::workspace(pyspec::workspace_floats(p));
  if (p.batch * p.heads * p.nodes > 0) pyspec_tree_attention_table[pyspec::instruction_set()](p);
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("tree_attention", TORCH_BOX(&tree_attention)); }
