// The layers of a Llama-shaped model as one program of kernels, run by all threads at once: what is left of a
// decoding step between two kernels is then a wait of a fraction of a microsecond, not a dispatch from
// Python.
#include <algorithm>
#include <cmath>
#include <map>
#include <utility>
#include <vector>

#include "params/block_masked_attention.h"
#include "params/rms_norm.h"
#include "params/rotary_write.h"
#include "params/swiglu.h"
#include "params/tree_attention.h"
#include "program.h"
#include "prompt_tiles.h"

namespace {

using pyspec::Buffer;
using pyspec::Element;
using pyspec::floats_of;
using pyspec::linear_of;
using pyspec::team_parallel_for;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_block_masked_attention, pyspec::BlockMaskedAttentionParams);
PYSPEC_KERNEL_TABLE(pyspec_linear, pyspec::LinearParams);
PYSPEC_KERNEL_TABLE(pyspec_rms_norm, pyspec::RmsNormParams);
PYSPEC_KERNEL_TABLE(pyspec_rotary_write, pyspec::RotaryWriteParams);
PYSPEC_KERNEL_TABLE(pyspec_swiglu, pyspec::SwigluParams);
PYSPEC_KERNEL_TABLE(pyspec_tree_attention, pyspec::TreeAttentionParams);

struct Layer {
  pyspec::RmsNormParams attention_norm, feed_forward_norm;
  pyspec::LinearParams qkv, output, gate_up, down;
  pyspec::RotaryWriteParams rotary;
  // One for each tree: of a long piece of a prompt among prompts, of others among trees.
  std::vector<pyspec::BlockMaskedAttentionParams> prompts;
  std::vector<pyspec::TreeAttentionParams> trees;
  pyspec::SwigluParams swiglu;
};

struct Program {
  std::vector<Layer> layers;
  pyspec::RmsNormParams last_norm;
  int isa;

  void run() const {
    for (const Layer& layer : layers) {
      pyspec_rms_norm_table[isa](layer.attention_norm);
      pyspec_linear_table[isa](layer.qkv);
      pyspec_rotary_write_table[isa](layer.rotary);
      for (const auto& prompt : layer.prompts) pyspec_block_masked_attention_table[isa](prompt);
      for (const auto& tree : layer.trees) pyspec_tree_attention_table[isa](tree);
      pyspec_linear_table[isa](layer.output);
      pyspec_rms_norm_table[isa](layer.feed_forward_norm);
      pyspec_linear_table[isa](layer.gate_up);
      pyspec_swiglu_table[isa](layer.swiglu);
      pyspec_linear_table[isa](layer.down);
    }
    pyspec_rms_norm_table[isa](last_norm);
  }
};

struct Shape {
  int64_t rows, hidden, heads, kv_heads, head_dim, intermediate, layers;
  int64_t qkv() const { return (heads + 2 * kv_heads) * head_dim; }
};

Tensor llama_layers(Tensor hidden, std::vector<Tensor> weights, std::vector<Tensor> biases,
                    const Tensor& last_norm, Tensor keys_values, const Tensor& cos_sin,
                    const Tensor& positions, std::vector<Tensor> ancestor_bits,
                    std::vector<int64_t> sequences, std::vector<int64_t> lengths,
                    std::vector<int64_t> windows, int64_t heads, int64_t intermediate, double epsilon) {
  auto int32 = torch::headeronly::ScalarType::Int;
  STD_TORCH_CHECK(keys_values.dim() == 6 && keys_values.size(1) == 2 && keys_values.stride(5) == 1,
                  "keys_values must be [layers, 2, batch, kv_heads, slots, head_dim]");
  Shape shape{hidden.size(0), hidden.size(1),     heads, keys_values.size(3), keys_values.size(5),
              intermediate,   keys_values.size(0)};
  int64_t rows = shape.rows, batch = keys_values.size(2), slots = keys_values.size(4);
  floats_of(hidden, rows * shape.hidden, "hidden");
  Element element = pyspec::element_of(keys_values, "keys_values");
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == 6 * shape.layers &&
                      (biases.empty() || static_cast<int64_t>(biases.size()) == 2 * shape.layers) &&
                      static_cast<int64_t>(windows.size()) == shape.layers,
                  "weights, biases and windows must have 6, 2 (or none) and 1 for each layer");
  STD_TORCH_CHECK(shape.heads % shape.kv_heads == 0 && shape.head_dim % 16 == 0 && shape.head_dim <= 256,
                  "heads must be a multiple of kv_heads, and head_dim one of 16 up to 256");
  STD_TORCH_CHECK(positions.scalar_type() == int32 && positions.numel() == rows && positions.is_contiguous(),
                  "positions must be int32 [rows] and contiguous");
  STD_TORCH_CHECK(cos_sin.dim() == 3 && cos_sin.size(1) == 2 && cos_sin.size(2) * 2 == shape.head_dim,
                  "cos_sin must be [positions, 2, head_dim / 2]");
  floats_of(cos_sin, cos_sin.size(0) * shape.head_dim, "cos_sin");

  // ==== the rows' places, checked because they are data ====
  size_t trees = ancestor_bits.size();
  STD_TORCH_CHECK(sequences.size() == trees && lengths.size() == trees,
                  "sequences and lengths must be one a tree");
  std::vector<int32_t> row_sequence, row_slot, prefix_lens;
  for (size_t tree = 0; tree < trees; ++tree) {
    const Tensor& bits = ancestor_bits[tree];
    STD_TORCH_CHECK(bits.dim() == 2 && bits.scalar_type() == int32 && bits.is_contiguous() &&
                        bits.size(0) > 0 && bits.size(1) == (bits.size(0) + 31) / 32,
                    "ancestor_bits must be int32 [nodes, ceil(nodes / 32)] and contiguous");
    int64_t nodes = bits.size(0), last = (nodes - 1) / 32;
    STD_TORCH_CHECK(sequences[tree] >= 0 && sequences[tree] < batch && lengths[tree] >= 0 &&
                        lengths[tree] + nodes <= slots,
                    "tree ", tree, " of ", nodes, " nodes does not fit sequence ", sequences[tree],
                    " at length ", lengths[tree], ": keys_values has ", batch, " sequences of ", slots,
                    " slots");
    const uint32_t* words = static_cast<const uint32_t*>(bits.data_ptr());
    for (int64_t node = 0; node < nodes; ++node) {
      STD_TORCH_CHECK(nodes % 32 == 0 || words[node * (last + 1) + last] >> nodes % 32 == 0,
                      "ancestor_bits of tree ", tree, " name a node past the last");
      row_sequence.push_back(static_cast<int32_t>(sequences[tree]));
      row_slot.push_back(static_cast<int32_t>(lengths[tree] + node));
    }
    prefix_lens.push_back(static_cast<int32_t>(lengths[tree]));
  }
  STD_TORCH_CHECK(static_cast<int64_t>(row_slot.size()) == rows, "hidden must have a row for each node, ",
                  row_slot.size(), ", got ", rows);
  const int32_t* at = static_cast<const int32_t*>(positions.data_ptr());
  for (int64_t row = 0; row < rows; ++row) {
    STD_TORCH_CHECK(at[row] >= 0 && at[row] < cos_sin.size(0), "positions[", row, "] is ", at[row],
                    ", cos_sin has ", cos_sin.size(0), " positions");
  }

  // Many rows of a chain are a piece of a prompt: they share tiles in block_masked_attention, which gives the
  // same bits. Of few rows the keys should be shared out to threads, as tree_attention does.
  std::map<std::pair<size_t, int64_t>, pyspec::PromptTiles> prompts;  // by tree and window
  for (size_t tree = 0; tree < trees; ++tree) {
    int64_t nodes = ancestor_bits[tree].size(0);
    const auto* bits = static_cast<const int32_t*>(ancestor_bits[tree].data_ptr());
    if (nodes <= pyspec::kTile || !pyspec::is_chain(bits, nodes)) continue;
    for (int64_t window : windows) prompts.try_emplace({tree, window}, nodes, lengths[tree], window);
  }

  // ==== the program: params of every kernel, first to size the buffer, then to run ====
  Tensor out = torch::stable::new_empty(keys_values, {rows, shape.hidden});
  int64_t bytes = pyspec::bytes_of(element);
  auto plan = [&](float* base) {
    Buffer buffer(base);
    char* x = buffer.take<char>(rows * std::max(shape.hidden, shape.intermediate) * bytes);
    float* wide = buffer.take(rows * std::max(shape.qkv(), 2 * shape.intermediate) * 4);
    float* delta = buffer.take(rows * shape.hidden * 4);
    char* q = buffer.take<char>(rows * shape.heads * shape.head_dim * bytes);
    char* mixed = buffer.take<char>(rows * shape.heads * shape.head_dim * bytes);
    float* lse = buffer.take(rows * shape.heads * 4);
    float* scratch = buffer.take(0);
    int64_t most_scratch = 0;
    auto norm_of = [&](const Tensor& weight, const float* added, void* to) {
      pyspec::RmsNormParams p{};
      p.hidden = static_cast<float*>(hidden.data_ptr()), p.delta = added, p.out = to;
      p.weight = floats_of(weight, shape.hidden, "a norm's weight");
      p.rows = rows, p.size = shape.hidden, p.groups = 1, p.epsilon = static_cast<float>(epsilon);
      p.out_element = element, p.parallel_for = team_parallel_for;
      return p;
    };
    auto linear = [&](const Tensor& weight, const void* from, float* to, int64_t inputs, int64_t outputs) {
      auto p = linear_of(weight, from, element, to, rows, inputs, outputs);
      p.workspace = scratch;
      most_scratch = std::max(most_scratch, pyspec::workspace_bytes(p));
      return p;
    };
    auto bias_of = [&](int64_t index, int64_t size) -> const float* {
      if (biases.empty() || biases[index].numel() == 0) return nullptr;
      return floats_of(biases[index], size, "a bias");
    };
    Program program;
    program.isa = pyspec::instruction_set();
    const float* added = nullptr;
    for (int64_t index = 0; index < shape.layers; ++index) {
      const Tensor* weight = &weights[6 * index];
      Layer layer;
      layer.attention_norm = norm_of(weight[0], added, x);
      layer.qkv = linear(weight[1], x, wide, shape.hidden, shape.qkv());
      layer.qkv.bias = bias_of(2 * index, shape.qkv());
      layer.output = linear(weight[2], mixed, delta, shape.heads * shape.head_dim, shape.hidden);
      layer.output.bias = bias_of(2 * index + 1, shape.hidden);
      layer.feed_forward_norm = norm_of(weight[3], delta, x);
      layer.gate_up = linear(weight[4], x, wide, shape.hidden, 2 * shape.intermediate);
      layer.down = linear(weight[5], x, delta, shape.intermediate, shape.hidden);
      layer.swiglu = {wide, x, rows, shape.intermediate, element, team_parallel_for};
      added = delta;

      char* k = static_cast<char*>(keys_values.data_ptr()) + index * keys_values.stride(0) * bytes;
      char* v = k + keys_values.stride(1) * bytes;
      auto& rotary = layer.rotary = {};
      rotary.qkv = wide, rotary.cos_sin = static_cast<const float*>(cos_sin.data_ptr()),
      rotary.positions = at;
      rotary.sequences = row_sequence.data(), rotary.slots = row_slot.data();
      rotary.q = q, rotary.k = k, rotary.v = v;
      for (int i = 0; i < 3; ++i) rotary.k_strides[i] = rotary.v_strides[i] = keys_values.stride(2 + i);
      rotary.rows = rows, rotary.heads = shape.heads, rotary.kv_heads = shape.kv_heads;
      rotary.head_dim = shape.head_dim, rotary.element = element, rotary.parallel_for = team_parallel_for;

      int64_t first_row = 0;
      for (size_t tree = 0; tree < trees; ++tree) {
        int64_t nodes = ancestor_bits[tree].size(0), window = windows[index];
        auto fill = [&](auto& p) {
          p.batch = 1, p.heads = shape.heads, p.kv_heads = shape.kv_heads, p.head_dim = shape.head_dim;
          int64_t row_bytes = shape.heads * shape.head_dim * bytes;
          p.q = q + first_row * row_bytes, p.out = mixed + first_row * row_bytes, p.lse = lse;
          p.k = k + sequences[tree] * keys_values.stride(2) * bytes;
          p.v = v + sequences[tree] * keys_values.stride(2) * bytes;
          p.q_strides[1] = p.out_strides[1] = shape.head_dim;
          p.q_strides[2] = p.out_strides[2] = shape.heads * shape.head_dim;
          for (int i = 0; i < 3; ++i) p.k_strides[i] = p.v_strides[i] = keys_values.stride(2 + i);
          p.scale = 1.0f / std::sqrt(static_cast<float>(shape.head_dim));
          p.element = element, p.parallel_for = team_parallel_for;
        };
        if (auto tiles = prompts.find({tree, window}); tiles != prompts.end()) {
          pyspec::BlockMaskedAttentionParams p{};
          fill(p);
          p.rows = nodes, p.keys = lengths[tree] + nodes;
          tiles->second.put(p);
          layer.prompts.push_back(p);
        } else {
          pyspec::TreeAttentionParams p{};
          fill(p);
          p.nodes = nodes, p.page = slots, p.window = window;
          p.ancestor_bits = static_cast<const int32_t*>(ancestor_bits[tree].data_ptr());
          p.prefix_lens = &prefix_lens[tree], p.longest_prefix = lengths[tree];
          p.workspace = scratch;
          most_scratch = std::max(most_scratch, 4 * pyspec::workspace_floats(p));
          layer.trees.push_back(p);
        }
        first_row += nodes;
      }
      program.layers.push_back(layer);
    }
    program.last_norm = norm_of(last_norm, added, out.data_ptr());
    buffer.take(most_scratch);
    return std::make_pair(std::move(program), buffer.floats());
  };
  float* base = pyspec::workspace(plan(nullptr).second);
  if (rows == 0) return out;
  Program program = plan(base).first;
  int64_t loops = shape.layers * (12 + 3 * static_cast<int64_t>(trees)) + 1;
  pyspec::run_team(loops, [](void* context) { static_cast<const Program*>(context)->run(); }, &program);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("llama_layers", TORCH_BOX(&llama_layers)); }
