// gated_delta: replays the accepted nodes of the last round, then verifies the nodes of this one.
//
// A state comes in panels of kDeltaLanes values of a head, [keys][kDeltaLanes] each, so that a vector holds
// what one key has of neighbouring values, and what a state answers is a sum of vectors.
#pragma once

#include "params/round.h"

namespace pyspec {

constexpr int64_t kDeltaLanes = 16;
constexpr int64_t kKeyMultiple = 16;    // keys is a multiple of it
constexpr float kDeltaEpsilon = 1e-6f;  // added to the squared lengths of q and k

struct GatedDeltaParams {
  float* state;   // [sequences, channels / 16, keys, 16], contiguous
  float* record;  // [2, sequences, record_nodes, record_width()], contiguous: of each node k of length 1,
                  // the correction u, and e^(A softplus(decay))
  const void* q;  // [rows, key_heads, keys]
  const void* k;  // like q
  const void* v;  // [rows, channels]
  const float* decay;    // [rows, decays]: one a head, or one for each key of a head
  const float* beta;     // [rows, heads]
  const float* a;        // [heads]
  const float* dt_bias;  // [decays] or null
  void* out;             // [rows, channels], contiguous

  int64_t sequences, record_nodes, channels, heads, key_heads, keys, decays;
  int64_t q_stride, k_stride, v_stride, decay_stride, beta_stride;  // elements from row to row
  float strength;                                                   // of a correction
  bool tiled;  // whether heads take turns at the key heads; else neighbours share one
  Round round;
  Element element;  // of q, k and v
  Element out_element;
  ParallelFor parallel_for;
};

namespace {  // compiled once per instruction set, so never shared between object files

PYSPEC_HOST_DEVICE inline int64_t record_width(const GatedDeltaParams& p) {
  return p.key_heads * p.keys + p.channels + p.decays;
}

PYSPEC_HOST_DEVICE inline int key_head_of(const GatedDeltaParams& p, int head) {
  int key_heads = static_cast<int>(p.key_heads),
      sharing = p.tiled ? 1 : static_cast<int>(p.heads) / key_heads;
  return head / sharing % key_heads;
}

// Whether a head is the first of those that share its key head, of which one records k.
PYSPEC_HOST_DEVICE inline bool is_first_of_key_head(const GatedDeltaParams& p, int head) {
  int heads = static_cast<int>(p.heads), key_heads = static_cast<int>(p.key_heads);
  return p.tiled ? head < key_heads : head % (heads / key_heads) == 0;
}

}  // namespace
}  // namespace pyspec
