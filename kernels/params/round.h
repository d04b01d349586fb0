// What one round of verifying asks of a recurrent state: which trees to read, and what of the last round to
// replay first.
#pragma once

#include "params/common.h"

namespace pyspec {

// The inputs of earlier rounds' nodes lie in one half of a record; the accepted ones are replayed from there.
// Either they are folded into the state, which is stored behind them, and this round's nodes go to the other
// half. Or the state stays what it is, and this round's nodes go to the same half, behind those that are
// kept. So no item reads what another one writes.
struct Round {
  const int32_t* sequences;  // [trees]: places in the state, each at most once
  const int32_t* starts;     // [trees + 1]: the nodes of tree i are rows starts[i] .. starts[i + 1] - 1
  const int32_t* parents;    // [rows]: nodes of the same tree, each before its child; -1 for the root, node 0
  const int32_t* paths;      // [trees, longest_path]: recorded nodes that were accepted, then -1
  const int32_t* halves;     // [trees]: the half of the record that they lie in, 0 or 1
  const int32_t* keeps;      // [trees]: -1 to fold, else the place in the half where this round's nodes begin
  const int32_t* advances;  // [trees]: 1 where the tree is a chain and accepted as a whole, so that the state
                            // moves behind it and nothing is recorded, else 0
  int64_t trees, longest_path;
};

namespace {  // compiled once per instruction set, so never shared between object files

// One tree of a round.
struct RoundTree {
  int64_t sequence, half, first_row, nodes, accepted;
  int64_t node_half, first_node;  // of the record, where this round's nodes go
  const int32_t *parents, *path;
  bool advance, fold;
};

PYSPEC_HOST_DEVICE inline RoundTree tree_of(const Round& round, int64_t index) {
  RoundTree tree{};
  tree.sequence = round.sequences[index], tree.half = round.halves[index];
  tree.first_row = round.starts[index], tree.nodes = round.starts[index + 1] - tree.first_row;
  tree.parents = round.parents + tree.first_row, tree.path = round.paths + index * round.longest_path;
  tree.advance = round.advances[index], tree.fold = round.keeps[index] < 0;
  tree.node_half = tree.fold ? 1 - tree.half : tree.half;
  tree.first_node = tree.fold ? 0 : round.keeps[index];
  while (tree.accepted < round.longest_path && tree.path[tree.accepted] >= 0) ++tree.accepted;
  return tree;
}

}  // namespace
}  // namespace pyspec
