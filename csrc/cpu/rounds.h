// The tensors of a Round, checked because what they hold decides where the kernels read and write.
#pragma once

#include <vector>

#include "boundary.h"
#include "params/round.h"

namespace pyspec {

// The tensors that a round points to.
struct RoundTensors {
  torch::stable::Tensor sequences, starts, parents, paths, halves, advances;
};

// rows: of the inputs; sequences and record_nodes: of the state and of the record.
inline Round round_of(const RoundTensors& tensors, int64_t rows, int64_t sequences, int64_t record_nodes) {
  Round round{};
  round.sequences = int32s_of(tensors.sequences, 1, "sequences");
  round.starts = int32s_of(tensors.starts, 1, "starts");
  round.parents = int32s_of(tensors.parents, 1, "parents");
  round.paths = int32s_of(tensors.paths, 2, "paths");
  round.halves = int32s_of(tensors.halves, 1, "halves");
  round.advances = int32s_of(tensors.advances, 1, "advances");
  round.trees = tensors.sequences.size(0), round.longest_path = tensors.paths.size(1);
  STD_TORCH_CHECK(tensors.starts.size(0) == round.trees + 1 && tensors.paths.size(0) == round.trees &&
                      tensors.halves.size(0) == round.trees && tensors.advances.size(0) == round.trees,
                  "starts must have ", round.trees + 1, " entries, and paths, halves and advances ",
                  round.trees, ", for ", round.trees, " sequences");
  STD_TORCH_CHECK(tensors.parents.size(0) == rows, "parents must have one entry for each of the ", rows,
                  " rows, got ", tensors.parents.size(0));
  STD_TORCH_CHECK(round.starts[0] == 0 && round.starts[round.trees] == rows, "starts must go from 0 to ",
                  rows, ", got ", round.starts[0], " and ", round.starts[round.trees]);
  std::vector<bool> seen(sequences);
  for (int64_t i = 0; i < round.trees; ++i) {
    int64_t sequence = round.sequences[i], nodes = round.starts[i + 1] - round.starts[i];
    STD_TORCH_CHECK(sequence >= 0 && sequence < sequences && !seen[sequence], "sequences[", i, "] is ",
                    sequence, ", must be in [0, ", sequences, ") and there once");
    seen[sequence] = true;
    bool advance = round.advances[i] == 1;
    STD_TORCH_CHECK(advance || round.advances[i] == 0, "advances[", i, "] must be 0 or 1, got ",
                    round.advances[i]);
    STD_TORCH_CHECK(nodes >= 0 && (advance || nodes <= record_nodes), "tree ", i, " has ", nodes,
                    " nodes, the record has room for ", record_nodes);
    STD_TORCH_CHECK(round.halves[i] == 0 || round.halves[i] == 1, "halves[", i, "] must be 0 or 1, got ",
                    round.halves[i]);
  }
  for (int64_t i = 0; i < round.trees; ++i) {
    const int32_t* parents = round.parents + round.starts[i];
    bool advance = round.advances[i];
    for (int64_t node = 0; node < round.starts[i + 1] - round.starts[i]; ++node) {
      bool fits = node == 0 ? parents[0] == -1 : parents[node] >= 0 && parents[node] < node;
      STD_TORCH_CHECK(fits && (!advance || parents[node] == node - 1), "parents of tree ", i, ": node ", node,
                      " has parent ", parents[node],
                      advance ? ", a chain that is accepted must have the node before" : "");
    }
    const int32_t* path = round.paths + i * round.longest_path;
    bool ended = false;
    for (int64_t place = 0; place < round.longest_path; ++place) {
      ended |= path[place] < 0;
      STD_TORCH_CHECK(ended ? path[place] == -1 : path[place] < record_nodes, "paths[", i, "][", place,
                      "] is ", path[place], ", must be a recorded node, of ", record_nodes,
                      ", or -1 behind the last");
    }
  }
  return round;
}

}  // namespace pyspec
