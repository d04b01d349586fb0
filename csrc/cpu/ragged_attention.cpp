// Attention of ragged rows: each sequence's tree by tree_attention, a long piece of a prompt by
// block_masked_attention, where its rows share tiles. Both give a row the same bits.
#include "params/tree_attention.h"
#include "prompt_tiles.h"
#include "tape.h"

namespace {

using pyspec::BlockMaskedAttentionParams;
using pyspec::TreeAttentionParams;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_block_masked_attention, BlockMaskedAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_tree_attention, TreeAttentionParams);

struct RaggedAttentionParams {
  TreeAttentionParams all;       // as for one tree of all rows in the first sequence
  const int32_t* starts;         // [sequences + 1], of each tree's rows
  const int32_t* prefix_lens;    // [sequences]
  const int32_t* ancestor_bits;  // [rows, words]
  int64_t sequences, words, slots;
  int64_t bytes;  // of an element
};

// The place of `elements` behind a pointer to elements of some type.
template <class T>
T* behind(T* pointer, int64_t elements, int64_t bytes) {
  using Byte = std::conditional_t<std::is_const_v<T>, const char, char>;
  return static_cast<Byte*>(pointer) + elements * bytes;
}

class RaggedAttention : public pyspec::Launch {
 public:
  explicit RaggedAttention(const RaggedAttentionParams& p) : p_(p) {
    const int isa = pyspec::instruction_set();
    by_tree_ = pyspec_tree_attention_table[isa], by_tile_ = pyspec_block_masked_attention_table[isa];
    trees_.reserve(p.sequences), prompts_.reserve(p.sequences), tiles_.reserve(p.sequences);
  }

  int64_t prepare() override {
    trees_.clear(), prompts_.clear(), tiles_.clear();
    int64_t most = 0;
    for (int64_t sequence = 0; sequence < p_.sequences; ++sequence) {
      const int64_t first = p_.starts[sequence], nodes = p_.starts[sequence + 1] - first;
      const int64_t prefix = p_.prefix_lens[sequence];
      if (nodes == 0) continue;
      const int32_t* bits = p_.ancestor_bits + first * p_.words;
      if (nodes > pyspec::kTile && pyspec::is_chain(bits, nodes, p_.words)) {
        tiles_.emplace_back(nodes, prefix, p_.all.window, p_.all.chunked);
        BlockMaskedAttentionParams p{};
        set(p, sequence, first);
        p.rows = nodes, p.keys = prefix + nodes;
        tiles_.back().put(p);
        prompts_.push_back(p);
      } else {
        TreeAttentionParams p{};
        set(p, sequence, first);
        p.nodes = nodes, p.page = p_.slots, p.window = p_.all.window, p.chunked = p_.all.chunked;
        p.ancestor_bits = bits, p.words = p_.words, p.prefix_lens = p_.prefix_lens + sequence,
        p.longest_prefix = prefix;
        most = std::max(most, pyspec::workspace_floats(p));
        trees_.push_back(p);
      }
    }
    return lse_floats() + most;
  }

  // lse comes first, which nobody reads, so that all trees may write there.
  void place(float* workspace) override {
    for (auto& prompt : prompts_) prompt.lse = workspace;
    for (auto& tree : trees_) tree.lse = workspace, tree.workspace = workspace + lse_floats();
  }

  void run() const override {
    for (const auto& prompt : prompts_) by_tile_(prompt);
    for (const auto& tree : trees_) by_tree_(tree);
  }

  int64_t loops() const override { return 4 * p_.sequences; }
  std::pair<char*, size_t> params() override { return {reinterpret_cast<char*>(&p_), sizeof p_}; }

 private:
  template <class Params>
  void set(Params& p, int64_t sequence, int64_t first) {
    const TreeAttentionParams& all = p_.all;
    p.batch = 1, p.heads = all.heads, p.kv_heads = all.kv_heads, p.head_dim = all.head_dim;
    p.q = behind(all.q, first * all.q_strides[2], p_.bytes);
    p.out = behind(all.out, first * all.out_strides[2], p_.bytes);
    p.k = behind(all.k, sequence * all.k_strides[0], p_.bytes);
    p.v = behind(all.v, sequence * all.v_strides[0], p_.bytes);
    for (int i = 0; i < 3; ++i) {
      p.q_strides[i] = all.q_strides[i], p.out_strides[i] = all.out_strides[i];
      p.k_strides[i] = all.k_strides[i], p.v_strides[i] = all.v_strides[i];
    }
    p.sinks = all.sinks, p.scale = all.scale, p.softcap = all.softcap, p.element = all.element,
    p.parallel_for = all.parallel_for;
  }

  int64_t lse_floats() const { return pyspec::ceil_div(p_.all.nodes * p_.all.heads, 16) * 16; }

  RaggedAttentionParams p_;
  void (*by_tree_)(const TreeAttentionParams&);
  void (*by_tile_)(const BlockMaskedAttentionParams&);
  std::vector<TreeAttentionParams> trees_;
  std::vector<BlockMaskedAttentionParams> prompts_;
  std::vector<pyspec::PromptTiles> tiles_;
};

// What the lengths and bits name must be inside of the cache and of the trees: checked here because they are
// data.
void check_trees(const RaggedAttentionParams& p) {
  const int64_t rows = p.all.nodes;
  STD_TORCH_CHECK(p.starts[0] == 0 && p.starts[p.sequences] == rows, "starts must go from 0 to ", rows,
                  ", got ", p.starts[0], " and ", p.starts[p.sequences]);
  for (int64_t sequence = 0; sequence < p.sequences; ++sequence) {
    const int64_t first = p.starts[sequence], nodes = p.starts[sequence + 1] - first;
    const int64_t prefix = p.prefix_lens[sequence];
    STD_TORCH_CHECK(nodes >= 0 && first + nodes <= rows, "starts[", sequence + 1, "] must not be below ",
                    first, " nor above ", rows, ", got ", first + nodes);
    STD_TORCH_CHECK(nodes <= 32 * p.words, "ancestor_bits must have ", pyspec::ceil_div(nodes, 32),
                    " words for a tree of ", nodes, " nodes, got ", p.words);
    int64_t reach = 0;  // 1 + the largest node that any row names; padding names none
    for (int64_t node = 0; node < nodes; ++node) {
      const int32_t* bits = p.ancestor_bits + (first + node) * p.words;
      for (int64_t word = reach / 32; word < p.words; ++word) {
        if (bits[word]) reach = std::max<int64_t>(reach, word * 32 + 32 - __builtin_clz(bits[word]));
      }
    }
    STD_TORCH_CHECK(prefix >= 0 && prefix + reach <= p.slots, "prefix_lens[", sequence, "] is ", prefix,
                    " and ancestor_bits name node ", reach - 1, ", but k has only ", p.slots, " slots");
  }
}

Tensor ragged_attention(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& ancestor_bits,
                        const Tensor& starts, const Tensor& prefix_lens, double scale,
                        std::optional<double> softcap, std::optional<int64_t> window,
                        const std::optional<Tensor>& sinks, bool chunked) {
  STD_TORCH_CHECK(q.dim() == 3 && q.is_contiguous(), "q must be [rows, heads, head_dim] and contiguous");
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4 && k.stride(3) == 1 && v.stride(3) == 1,
                  "k and v must be [sequences, kv_heads, slots, head_dim] with a contiguous last dimension");
  STD_TORCH_CHECK(k.scalar_type() == q.scalar_type() && v.scalar_type() == q.scalar_type(),
                  "q, k and v must have one dtype");
  for (int i = 0; i < 4; ++i) STD_TORCH_CHECK(k.size(i) == v.size(i), "v must have the shape of k");
  RaggedAttentionParams p{};
  auto& all = p.all;
  all.element = pyspec::element_of(q, "q");
  all.batch = 1, all.nodes = q.size(0), all.heads = q.size(1), all.head_dim = q.size(2),
  all.kv_heads = k.size(1);
  p.sequences = k.size(0), p.slots = k.size(2), p.bytes = pyspec::bytes_of(all.element);
  STD_TORCH_CHECK(all.head_dim % 16 == 0 && all.head_dim > 0 && all.head_dim <= pyspec::kMaxHeadDim &&
                      k.size(3) == all.head_dim,
                  "q must have the head_dim of k, a multiple of 16 of at most 512, got ", all.head_dim);
  STD_TORCH_CHECK(all.kv_heads > 0 && all.heads % all.kv_heads == 0,
                  "k must have a number of heads that divides q's");
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
  p.ancestor_bits = pyspec::int32s_of(ancestor_bits, 2, "ancestor_bits"), p.words = ancestor_bits.size(1);
  p.starts = pyspec::int32s_of(starts, 1, "starts"),
  p.prefix_lens = pyspec::int32s_of(prefix_lens, 1, "prefix_lens");
  STD_TORCH_CHECK(ancestor_bits.size(0) == all.nodes, "ancestor_bits must have a row for each of q");
  STD_TORCH_CHECK(starts.size(0) == p.sequences + 1 && prefix_lens.size(0) == p.sequences,
                  "starts and prefix_lens must have ", p.sequences + 1, " and ", p.sequences, " entries");
  if (sinks) all.sinks = pyspec::sinks_of(*sinks, all.heads);
  check_trees(p);

  Tensor out = pyspec::new_tensor({all.nodes, all.heads, all.head_dim}, q.scalar_type());
  all.q = q.data_ptr(), all.k = k.data_ptr(), all.v = v.data_ptr(), all.out = out.data_ptr();
  all.q_strides[1] = all.out_strides[1] = all.head_dim;
  all.q_strides[2] = all.out_strides[2] = all.heads * all.head_dim;
  pyspec::copy_strides(k, all.k_strides), pyspec::copy_strides(v, all.v_strides);
  all.scale = static_cast<float>(scale), all.softcap = static_cast<float>(softcap.value_or(0.0));
  all.window = window.value_or(0), all.chunked = chunked && window;
  all.parallel_for = pyspec::Tape::recording() ? pyspec::team_parallel_for : pyspec::parallel_for;
  pyspec::launch(std::make_unique<RaggedAttention>(p));
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("ragged_attention", TORCH_BOX(&ragged_attention)); }
