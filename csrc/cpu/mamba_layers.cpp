// The layers of a Mamba or Mamba-2 model as one program of kernels, run by all threads at once; see
// llama_layers.cpp.
#include <algorithm>
#include <utility>
#include <vector>

#include "params/causal_conv.h"
#include "params/rms_norm.h"
#include "params/selective_state.h"
#include "program.h"
#include "rounds.h"

namespace {

using pyspec::Buffer;
using pyspec::Element;
using pyspec::floats_of;
using pyspec::team_parallel_for;
using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_causal_conv, pyspec::CausalConvParams);
PYSPEC_KERNEL_TABLE(pyspec_linear, pyspec::LinearParams);
PYSPEC_KERNEL_TABLE(pyspec_rms_norm, pyspec::RmsNormParams);
PYSPEC_KERNEL_TABLE(pyspec_selective_state, pyspec::SelectiveStateParams);

// In the order of WEIGHTS in pyspec/ops/mamba_layers.py.
enum Weight {
  kNorm,
  kInProj,
  kInBias,
  kConvWeight,
  kConvBias,
  kXProj,
  kDtProj,
  kA,
  kD,
  kDtBias,
  kGateNorm,
  kOutProj,
  kOutBias,
  kWeights
};

struct Layer {
  pyspec::RmsNormParams norm, gate_norm;
  pyspec::LinearParams in_proj, x_proj, dt_proj, out_proj;
  pyspec::CausalConvParams conv;
  pyspec::SelectiveStateParams state;
};

struct Program {
  std::vector<Layer> layers;
  pyspec::RmsNormParams last_norm;
  bool is_mamba2;
  int isa;

  void run() const {
    for (const Layer& layer : layers) {
      pyspec_rms_norm_table[isa](layer.norm);
      pyspec_linear_table[isa](layer.in_proj);
      pyspec_causal_conv_table[isa](layer.conv);
      if (!is_mamba2) {
        pyspec_linear_table[isa](layer.x_proj);
        pyspec_linear_table[isa](layer.dt_proj);
      }
      pyspec_selective_state_table[isa](layer.state);
      if (is_mamba2) pyspec_rms_norm_table[isa](layer.gate_norm);
      pyspec_linear_table[isa](layer.out_proj);
    }
    pyspec_rms_norm_table[isa](last_norm);
  }
};

// One layer's part of a tensor of all layers, fp32.
float* part_of(const Tensor& tensor, int64_t layer) {
  return static_cast<float*>(tensor.data_ptr()) + layer * tensor.stride(0);
}

Tensor mamba_layers(Tensor hidden, std::vector<Tensor> weights, const Tensor& last_norm, Tensor states,
                    Tensor windows, Tensor records, Tensor conv_records, const Tensor& sequences,
                    const Tensor& starts, const Tensor& parents, const Tensor& paths, const Tensor& halves,
                    const Tensor& advances, int64_t dt_rank, double epsilon,
                    torch::headeronly::ScalarType dtype) {
  auto float32 = torch::headeronly::ScalarType::Float;
  STD_TORCH_CHECK(hidden.dim() == 2, "hidden must be [rows, size]");
  int64_t rows = hidden.size(0), size = hidden.size(1);
  floats_of(hidden, rows * size, "hidden");
  STD_TORCH_CHECK(states.dim() == 5 && states.size(4) == pyspec::kStateLanes && windows.dim() == 4 &&
                      records.dim() == 5 && conv_records.dim() == 5,
                  "states, windows, records and conv_records must have 5, 4, 5 and 5 dimensions");
  int64_t layers = states.size(0), batch = states.size(1), nodes = records.size(3);
  int64_t channels = states.size(2) * pyspec::kStateLanes, state_size = states.size(3);
  int64_t taps = windows.size(2) + 1, conv_channels = windows.size(3);
  STD_TORCH_CHECK(static_cast<int64_t>(weights.size()) == kWeights * layers && layers > 0, "weights must be ",
                  int64_t{kWeights}, " for each layer");
  STD_TORCH_CHECK(state_size % pyspec::kStateMultiple == 0 && taps <= pyspec::kMostConvTaps &&
                      conv_channels % pyspec::kConvLanes == 0 && conv_channels >= channels,
                  "states must hold a multiple of ", pyspec::kStateMultiple, ", and windows fewer than ",
                  pyspec::kMostConvTaps, " inputs of a multiple of ", pyspec::kConvLanes, " channels");
  bool is_mamba2 = weights[kA].dim() == 1;
  int64_t heads = is_mamba2 ? weights[kA].size(0) : channels;
  int64_t groups = is_mamba2 ? weights[kGateNorm].size(0) : 1;
  STD_TORCH_CHECK(
      heads > 0 && groups > 0 && heads % groups == 0 && channels % heads == 0 &&
          (!is_mamba2 || channels / heads % pyspec::kStateLanes == 0) &&
          conv_channels == channels + (is_mamba2 ? 2 * groups * state_size : 0) &&
          (is_mamba2 ? dt_rank == 0 : dt_rank > 0),
      "weights must be those of Mamba, or of Mamba-2 with dt_rank 0, in the sizes of states and windows");
  int64_t width = channels + heads + groups * state_size;
  for (const auto& [tensor, floats, name] :
       {std::tuple{&states, layers * batch * channels * state_size, "states"},
        std::tuple{&windows, layers * batch * (taps - 1) * conv_channels, "windows"},
        std::tuple{&records, layers * 2 * batch * nodes * width, "records"},
        std::tuple{&conv_records, layers * 2 * batch * nodes * conv_channels, "conv_records"}})
    floats_of(*tensor, floats, name);
  pyspec::RoundTensors round_tensors{sequences, starts, parents, paths, halves, advances};
  pyspec::Round round = pyspec::round_of(round_tensors, rows, batch, nodes);

  // ==== the program: params of every kernel, first to size the buffer, then to run ====
  Tensor out = torch::stable::new_empty(hidden, {rows, size}, dtype);
  Element element = pyspec::element_of(out, "out");
  int64_t bytes = pyspec::bytes_of(element);
  int64_t inputs = is_mamba2 ? channels + conv_channels + heads : 2 * channels;
  int64_t low_size = dt_rank + 2 * state_size;
  auto plan = [&](float* base) {
    Buffer buffer(base);
    char* x = buffer.take<char>(rows * size * bytes);
    float* wide = buffer.take(rows * inputs * 4);
    char* convolved = buffer.take<char>(rows * conv_channels * (is_mamba2 ? 4 : bytes));
    char* low = buffer.take<char>(is_mamba2 ? 0 : rows * low_size * bytes);
    float* dt = buffer.take(is_mamba2 ? 0 : rows * channels * 4);
    float* y = buffer.take(is_mamba2 ? rows * channels * 4 : 0);
    char* mixed = buffer.take<char>(rows * channels * bytes);
    float* delta = buffer.take(rows * size * 4);
    float* scratch = buffer.take(0);
    int64_t most_scratch = 0;
    auto norm_of = [&](const Tensor& weight, float* from, const float* added, void* to, int64_t of_groups,
                       int64_t group_size) {
      pyspec::RmsNormParams p{};
      p.hidden = from, p.delta = added, p.out = to;
      p.weight = floats_of(weight, of_groups * group_size, "a norm's weight");
      p.rows = rows * of_groups, p.size = group_size, p.groups = of_groups;
      p.epsilon = static_cast<float>(epsilon), p.out_element = element, p.parallel_for = team_parallel_for;
      return p;
    };
    auto linear = [&](const Tensor& weight, const void* from, float* to, int64_t from_size, int64_t to_size) {
      auto p = pyspec::linear_of(weight, from, element, to, rows, from_size, to_size);
      p.workspace = scratch;
      most_scratch = std::max(most_scratch, pyspec::workspace_bytes(p));
      return p;
    };
    auto optional = [](const Tensor& tensor, int64_t floats, const char* name) -> const float* {
      return tensor.numel() ? floats_of(tensor, floats, name) : nullptr;
    };
    float* stream = static_cast<float*>(hidden.data_ptr());
    Program program;
    program.isa = pyspec::instruction_set(), program.is_mamba2 = is_mamba2;
    const float* added = nullptr;
    for (int64_t index = 0; index < layers; ++index) {
      const Tensor* weight = &weights[kWeights * index];
      Layer layer{};
      layer.norm = norm_of(weight[kNorm], stream, added, x, 1, size);
      layer.in_proj = linear(weight[kInProj], x, wide, size, inputs);
      layer.in_proj.bias = optional(weight[kInBias], inputs, "in_bias");

      auto& conv = layer.conv;
      conv.window = part_of(windows, index), conv.record = part_of(conv_records, index);
      conv.x = wide + (is_mamba2 ? channels : 0), conv.x_stride = inputs;
      conv.weight = floats_of(weight[kConvWeight], taps * conv_channels, "conv_weight");
      conv.bias = optional(weight[kConvBias], conv_channels, "conv_bias");
      conv.out = convolved, conv.out_element = is_mamba2 ? Element::kFloat32 : element;
      conv.sequences = batch, conv.record_nodes = nodes, conv.channels = conv_channels, conv.taps = taps;
      conv.round = round, conv.parallel_for = team_parallel_for;

      auto& state = layer.state;
      state.state = part_of(states, index), state.record = part_of(records, index);
      state.x = convolved, state.x_element = conv.out_element, state.x_stride = conv_channels;
      state.z = wide + (is_mamba2 ? 0 : channels), state.z_stride = inputs;
      state.a = floats_of(weight[kA], is_mamba2 ? heads : channels * state_size, "A");
      state.d = floats_of(weight[kD], channels, "D");
      state.dt_bias = floats_of(weight[kDtBias], heads, "dt_bias");
      state.sequences = batch, state.record_nodes = nodes, state.channels = channels, state.heads = heads;
      state.groups = groups, state.state_size = state_size, state.a_per_state = !is_mamba2;
      state.round = round, state.parallel_for = team_parallel_for;
      if (is_mamba2) {
        state.b = convolved + channels * 4, state.c = convolved + (channels + groups * state_size) * 4;
        state.b_stride = state.c_stride = conv_channels;
        state.dt = wide + channels + conv_channels, state.dt_stride = inputs;
        state.out = y, state.out_element = Element::kFloat32;
        layer.gate_norm = norm_of(weight[kGateNorm], y, nullptr, mixed, groups, channels / groups);
      } else {
        layer.x_proj = linear(weight[kXProj], convolved, reinterpret_cast<float*>(low), channels, low_size);
        layer.x_proj.out_element = element;
        layer.dt_proj = linear(weight[kDtProj], low, dt, dt_rank, channels);
        layer.dt_proj.x_stride = low_size;
        state.b = low + dt_rank * bytes, state.c = low + (dt_rank + state_size) * bytes;
        state.b_stride = state.c_stride = low_size;
        state.dt = dt, state.dt_stride = channels;
        state.out = mixed, state.out_element = element;
      }
      layer.out_proj = linear(weight[kOutProj], mixed, delta, channels, size);
      layer.out_proj.bias = optional(weight[kOutBias], size, "out_bias");
      added = delta;
      program.layers.push_back(layer);
    }
    program.last_norm = norm_of(last_norm, stream, added, out.data_ptr(), 1, size);
    buffer.take(most_scratch);
    return std::make_pair(std::move(program), buffer.floats());
  };
  STD_TORCH_CHECK(last_norm.scalar_type() == float32, "last_norm must be float32");
  float* base = pyspec::workspace(plan(nullptr).second);
  if (rows == 0) return out;
  Program program = plan(base).first;
  pyspec::run_team(
      layers * 12 + 1, [](void* context) { static_cast<const Program*>(context)->run(); }, &program);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("mamba_layers", TORCH_BOX(&mamba_layers)); }
