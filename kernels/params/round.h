// What one round of verifying asks of a recurrent state: which trees to read, and what of the last round to
// replay first.
#pragma once

#include "params/common.h"

namespace pyspec {

// The inputs of the last round's nodes lie in one half of a record. The accepted ones are replayed from
// there, the state is stored behind them, and this round's nodes go to the other half. So no item reads what
// another one writes.
struct Round {
  const int32_t* sequences;  // [trees]: places in the state, each at most once
  const int32_t* starts;     // [trees + 1]: the nodes of tree i are rows starts[i] .. starts[i + 1] - 1
  const int32_t* parents;    // [rows]: nodes of the same tree, each before its child; -1 for the root, node 0
  const int32_t* paths;      // [trees, longest_path]: recorded nodes that were accepted, then -1
  const int32_t* halves;     // [trees]: the half of the record that they lie in, 0 or 1
  const int32_t* advances;  // [trees]: 1 where the tree is a chain and accepted as a whole, so that the state
                            // moves behind it and nothing is recorded, else 0
  int64_t trees, longest_path;
};

namespace {  // compiled once per instruction set, so never shared between object files

// One tree of a round.
struct RoundTree {
  int64_t sequence, half, first_row, nodes, accepted;
  const int32_t *parents, *path;
  bool advance;
};

PYSPEC_HOST_DEVICE inline RoundTree tree_of(const Round& round, int64_t index) {
  RoundTree tree{};
  tree.sequence = round.sequences[index], tree.half = round.halves[index];
  tree.first_row = round.starts[index], tree.nodes = round.starts[index + 1] - tree.first_row;
  tree.parents = round.parents + tree.first_row, tree.path = round.paths + index * round.longest_path;
  tree.advance = round.advances[index];
  while (tree.accepted < round.longest_path && tree.path[tree.accepted] >= 0) ++tree.accepted;
  return tree;
}

}  // namespace
}  // namespace pyspec
