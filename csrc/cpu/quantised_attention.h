// Attention of ragged rows over a quantised cache: each tree to its quantised blocks, to the keys behind them
// in full precision, and both joined. A node far enough from a block sees it quantised, unlike its root
// perhaps; such a node takes another part in full precision, which begins that many blocks later.
#pragma once

#include <algorithm>
#include <optional>
#include <vector>

#include "../quantised.h"
#include "params/merge_attention.h"
#include "params/tree_attention.h"
#include "tape.h"

namespace pyspec {

constexpr int64_t kQuantisedBlock = 128;  // tokens of a record, of any format

PYSPEC_KERNEL_TABLE(pyspec_tree_attention, TreeAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_merge_attention, MergeAttentionParams);

// New records [batch, kv_heads, blocks, record_bytes] of the blocks that p has.
template <class Params>
torch::stable::Tensor encode_blocks(Params& p, const torch::stable::Tensor& k, int64_t record_bytes,
                                    const KernelTable<Params>& table) {
  auto records = torch::stable::new_empty(k, {p.batch, p.kv_heads, p.blocks, record_bytes},
                                          torch::headeronly::ScalarType::Byte);
  p.quantised = static_cast<uint8_t*>(records.data_ptr());
  p.parallel_for = parallel_for;
  if (p.batch * p.kv_heads * p.blocks > 0) table[instruction_set()](p);
  return records;
}

// Attention of p's rows to the blocks that they see, none more than there are: out like q and lse.
template <class Params>
std::tuple<torch::stable::Tensor, torch::stable::Tensor> attend_blocks(
    Params& p, const torch::stable::Tensor& q, const torch::stable::Tensor& quantised,
    const torch::stable::Tensor& seen, const std::optional<torch::stable::Tensor>& oldest,
    const KernelTable<Params>& table, int64_t (*workspace_of)(const Params&)) {
  auto counts = torch::stable::contiguous(seen);
  auto tokens = torch::stable::contiguous(oldest.value_or(seen));
  if (oldest) p.oldest = int32s_of(tokens, 2, "oldest");
  STD_TORCH_CHECK(tokens.size(0) == p.batch && tokens.size(1) == p.nodes,
                  "oldest must be [batch, nodes] like seen");
  p.seen = static_cast<const int32_t*>(counts.data_ptr());
  const int64_t blocks = quantised.size(2);
  for (int64_t row = 0; row < p.batch * p.nodes; ++row) {
    STD_TORCH_CHECK(p.seen[row] >= 0 && p.seen[row] <= blocks, "seen[", row / p.nodes, "][", row % p.nodes,
                    "] is ", p.seen[row], ", quantised has ", blocks, " blocks");
    p.most_seen = std::max<int64_t>(p.most_seen, p.seen[row]);
  }
  auto results = set_results(p, q);
  p.parallel_for = parallel_for;
  p.workspace = workspace(workspace_of(p));
  if (p.batch * p.heads * p.nodes > 0) table[instruction_set()](p);
  return results;
}

template <class Quantised>
struct QuantisedAttentionParams {
  Quantised blocks;  // of all rows as one tree of the first sequence; seen and the results are not set
  TreeAttentionParams exact;     // the same of the keys behind the blocks
  const int32_t* seen;           // [rows], blocks of span tokens
  const int32_t* starts;         // [sequences + 1]
  const int32_t* prefix_lens;    // [sequences]
  const int32_t* ancestor_bits;  // [rows, words]
  void* out;                     // [rows, heads, head_dim], contiguous
  int64_t sequences, words, rows, slots, span, records, bytes;
  int64_t window;  // a row sees the keys less than so many positions before its own; 0: all
};

template <class Quantised>
class QuantisedAttention : public Launch {
 public:
  using Params = QuantisedAttentionParams<Quantised>;
  QuantisedAttention(const Params& p, const KernelTable<Quantised>& table,
                     int64_t (*workspace)(const Quantised&))
      : p_(p), workspace_(workspace) {
    const int isa = instruction_set();
    by_block_ = table[isa], by_tree_ = pyspec_tree_attention_table[isa],
    merge_ = pyspec_merge_attention_table[isa];
    trees_.resize(p.sequences);
  }

  int64_t prepare() override {
    most_ = 0;
    for (int64_t sequence = 0; sequence < p_.sequences; ++sequence) set(trees_[sequence], sequence);
    const int64_t rows = p_.rows * p_.exact.heads;
    out_floats_ = aligned(rows * p_.exact.head_dim), lse_floats_ = aligned(rows);
    return (most_parts_ + 1) * (out_floats_ + lse_floats_) + lse_floats_ + most_;
  }

  // First the blocks' out and lse, then each part's, then the lse of all, which nobody reads, then what a
  // kernel takes.
  void place(float* workspace) override {
    float* scratch = workspace + (most_parts_ + 1) * (out_floats_ + lse_floats_) + lse_floats_;
    for (Tree& tree : trees_) {
      if (tree.exact.empty()) continue;
      tree.blocks.out = workspace, tree.blocks.lse = workspace + out_floats_, tree.blocks.workspace = scratch;
      float* parts = workspace + out_floats_ + lse_floats_;
      for (auto& part : tree.exact) {
        part.out = parts, part.lse = parts + out_floats_, part.workspace = scratch;
        parts += out_floats_ + lse_floats_;
      }
      MergeAttentionParams& p = tree.merge;
      p.out_a = tree.blocks.out, p.lse_a = tree.blocks.lse;
      p.out_b = tree.exact[0].out, p.lse_b = tree.exact[0].lse;
      p.part_bytes = (out_floats_ + lse_floats_) * static_cast<int64_t>(sizeof(float));
      p.lse = scratch - lse_floats_;
    }
  }

  void run() const override {
    for (const Tree& tree : trees_) {
      if (tree.exact.empty()) continue;
      by_block_(tree.blocks);
      for (const auto& part : tree.exact) by_tree_(part);
      merge_(tree.merge);
    }
  }

  int64_t loops() const override { return 16 * p_.sequences; }
  std::pair<char*, size_t> params() override { return {reinterpret_cast<char*>(&p_), sizeof p_}; }

 private:
  struct Tree {
    Quantised blocks;
    std::vector<TreeAttentionParams> exact;
    MergeAttentionParams merge;
    std::vector<int32_t> records, oldest, parts, lens;
  };

  static int64_t aligned(int64_t floats) { return ceil_div(floats, 16) * 16; }

  int32_t depth(int64_t row) const {
    int32_t ancestors = 0;
    for (int64_t word = 0; word < p_.words; ++word)
      ancestors += __builtin_popcount(p_.ancestor_bits[row * p_.words + word]);
    return ancestors - 1;
  }

  void set(Tree& tree, int64_t sequence) {
    const int64_t first = p_.starts[sequence], nodes = p_.starts[sequence + 1] - first;
    tree.exact.clear();
    if (nodes == 0) return;
    tree.records.resize(nodes), tree.parts.resize(nodes);
    int32_t most = 0;
    for (int64_t node = 0; node < nodes; ++node) {
      const int32_t seen = p_.seen[first + node];
      tree.records[node] = seen * static_cast<int32_t>(p_.records);
      tree.parts[node] = seen - p_.seen[first];
      most = std::max(most, tree.parts[node]);
    }
    tree.oldest.clear();
    const int32_t root = p_.seen[first] * p_.span + p_.prefix_lens[sequence];  // its position
    for (int64_t node = 0; p_.window && node < nodes; ++node)
      tree.oldest.push_back(root + depth(first + node) - p_.window + 1);
    const int64_t from = first * p_.exact.heads * p_.exact.head_dim * p_.bytes;
    tree.blocks = p_.blocks;
    Quantised& blocks = tree.blocks;
    blocks.q = static_cast<const char*>(p_.exact.q) + from;
    blocks.quantised += sequence * blocks.quantised_strides[0], blocks.seen = tree.records.data(),
                                                                blocks.nodes = nodes;
    blocks.oldest = p_.window ? tree.oldest.data() : nullptr;
    blocks.most_seen = *std::max_element(tree.records.begin(), tree.records.end());
    most_ = std::max(most_, workspace_(blocks));

    tree.lens.resize(most + 1);
    most_parts_ = std::max<int64_t>(most_parts_, most + 1);
    for (int32_t part = 0; part <= most; ++part) {
      TreeAttentionParams p = p_.exact;
      const int64_t past = part * p_.span, bytes = p_.bytes;
      tree.lens[part] = static_cast<int32_t>(std::max<int64_t>(p_.prefix_lens[sequence] - past, 0));
      p.q = blocks.q, p.nodes = nodes, p.window = p_.window;
      p.k = static_cast<const char*>(p.k) + (sequence * p.k_strides[0] + past * p.k_strides[2]) * bytes;
      p.v = static_cast<const char*>(p.v) + (sequence * p.v_strides[0] + past * p.v_strides[2]) * bytes;
      p.page = p_.slots - past, p.ancestor_bits = p_.ancestor_bits + first * p_.words, p.words = p_.words;
      p.prefix_lens = &tree.lens[part], p.longest_prefix = tree.lens[part];
      most_ = std::max(most_, workspace_floats(p));
      tree.exact.push_back(p);
    }
    MergeAttentionParams& merge = tree.merge = {};
    merge.out = static_cast<char*>(p_.out) + from;
    merge.rows = nodes * p_.exact.heads, merge.head_dim = p_.exact.head_dim, merge.heads = p_.exact.heads;
    merge.parts = tree.parts.data();
    merge.element = p_.exact.element, merge.parallel_for = p_.exact.parallel_for;
  }

  Params p_;
  int64_t (*workspace_)(const Quantised&);
  void (*by_block_)(const Quantised&);
  void (*by_tree_)(const TreeAttentionParams&);
  void (*merge_)(const MergeAttentionParams&);
  std::vector<Tree> trees_;
  int64_t most_ = 0, most_parts_ = 1, out_floats_ = 0, lse_floats_ = 0;
};

// The tensors of ragged rows over a quantised cache.
struct QuantisedRows {
  const torch::stable::Tensor &q, &quantised, &k, &v, &ancestor_bits, &seen, &starts, &prefix_lens;
  int64_t span, records;
  std::optional<int64_t> window;
};

// What every format's params have: sizes and tensors.
template <class Quantised>
Quantised quantised_params(const QuantisedRows& t, double scale) {
  STD_TORCH_CHECK(t.q.dim() == 3 && t.q.is_contiguous(), "q must be [rows, heads, head_dim] and contiguous");
  STD_TORCH_CHECK(t.k.dim() == 4 && t.v.dim() == 4 && t.quantised.dim() == 4,
                  "k, v and quantised must have 4 dimensions");
  STD_TORCH_CHECK(t.k.scalar_type() == t.q.scalar_type() && t.v.scalar_type() == t.q.scalar_type() &&
                      t.k.stride(3) == 1 && t.v.stride(3) == 1 && t.k.size(3) == t.q.size(2),
                  "k and v must be like q, with a contiguous last dimension");
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
  Quantised p{};
  p.element = element_of(t.q, "q");
  p.heads = t.q.size(1), p.head_dim = t.q.size(2), p.kv_heads = t.quantised.size(1);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.kv_heads == t.k.size(1) && p.heads % p.kv_heads == 0,
                  "quantised and k must have one number of heads, which divides q's");
  p.quantised = static_cast<const uint8_t*>(t.quantised.data_ptr());
  copy_strides(t.quantised, p.quantised_strides);
  p.scale = static_cast<float>(scale);
  return p;
}

inline void check_records(const torch::stable::Tensor& quantised, int64_t bytes) {
  STD_TORCH_CHECK(quantised.scalar_type() == torch::headeronly::ScalarType::Byte &&
                      quantised.size(3) == bytes && quantised.stride(3) == 1,
                  "quantised must be uint8 [sequences, kv_heads, records, ", bytes,
                  "] with a contiguous last dimension");
}

// Launches the attention of q [rows, heads, head_dim]; blocks has its format and what else the kernel reads.
template <class Quantised>
torch::stable::Tensor quantised_attention(Quantised blocks, const QuantisedRows& t, double scale,
                                          const KernelTable<Quantised>& table,
                                          int64_t (*workspace)(const Quantised&)) {
  QuantisedAttentionParams<Quantised> p{};
  p.rows = t.q.size(0), p.sequences = t.k.size(0), p.slots = t.k.size(2), p.span = t.span,
  p.records = t.records, p.window = t.window.value_or(0);
  STD_TORCH_CHECK(!t.window || (p.window > 0 && p.span == p.records * kQuantisedBlock),
                  "window must be positive, over blocks that keep all their tokens, got ", p.window,
                  " over blocks of ", p.span, " tokens in ", p.records, " records");
  p.ancestor_bits = int32s_of(t.ancestor_bits, 2, "ancestor_bits"), p.words = t.ancestor_bits.size(1);
  p.seen = int32s_of(t.seen, 1, "seen"), p.starts = int32s_of(t.starts, 1, "starts");
  p.prefix_lens = int32s_of(t.prefix_lens, 1, "prefix_lens");
  STD_TORCH_CHECK(t.seen.size(0) == p.rows && t.ancestor_bits.size(0) == p.rows,
                  "seen and ancestor_bits must have ", p.rows, " rows like q");
  STD_TORCH_CHECK(t.starts.size(0) == p.sequences + 1 && t.prefix_lens.size(0) == p.sequences &&
                      t.quantised.size(0) == p.sequences,
                  "starts, prefix_lens and quantised must be for the ", p.sequences, " sequences of k");
  STD_TORCH_CHECK(p.starts[0] == 0 && p.starts[p.sequences] == p.rows, "starts must go from 0 to ", p.rows);
  for (int64_t i = 0; i < p.sequences; ++i) {
    const int64_t nodes = p.starts[i + 1] - p.starts[i];
    STD_TORCH_CHECK(
        nodes >= 0 && nodes <= 32 * p.words && p.prefix_lens[i] >= 0 && p.prefix_lens[i] + nodes <= p.slots,
        "tree ", i, " of ", nodes, " nodes does not fit at ", p.prefix_lens[i], " in ", p.slots, " slots");
  }
  for (int64_t row = 0; row < p.rows; ++row) {
    STD_TORCH_CHECK(p.seen[row] >= 0 && p.seen[row] * p.records <= t.quantised.size(2), "seen[", row, "] is ",
                    p.seen[row], ", quantised has ", t.quantised.size(2), " records, ", p.records,
                    " a block");
  }
  const ParallelFor parallel = Tape::recording() ? team_parallel_for : parallel_for;
  TreeAttentionParams& exact = p.exact;
  exact.q = t.q.data_ptr(), exact.k = t.k.data_ptr(), exact.v = t.v.data_ptr();
  exact.batch = 1, exact.heads = t.q.size(1), exact.kv_heads = t.k.size(1), exact.head_dim = t.q.size(2);
  exact.element = blocks.element, exact.scale = static_cast<float>(scale), exact.parallel_for = parallel;
  copy_strides(t.k, exact.k_strides), copy_strides(t.v, exact.v_strides);
  exact.q_strides[1] = exact.out_strides[1] = exact.head_dim;
  exact.q_strides[2] = exact.out_strides[2] = exact.heads * exact.head_dim;
  for (int i = 0; i < 3; ++i) blocks.q_strides[i] = blocks.out_strides[i] = exact.q_strides[i];
  blocks.batch = 1, blocks.parallel_for = parallel;
  p.blocks = blocks, p.bytes = bytes_of(exact.element);
  auto out = new_tensor({p.rows, exact.heads, exact.head_dim}, t.q.scalar_type());
  p.out = out.data_ptr();
  launch(std::make_unique<QuantisedAttention<Quantised>>(p, table, workspace));
  return out;
}

}  // namespace pyspec
