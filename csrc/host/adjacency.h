// Token Recycling: what the target last thought could follow a token, or two tokens.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "coupling.h"
#include "growth.h"
#include "levels.h"
#include "params/row_statistics.h"

namespace pyspec {

// Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token
// Recycling", arXiv 2408.08696: a row of successors for each token. Beyond the paper, each successor carries
// a level of how sure the target was of it, and a second table has its rows by the last two tokens: kPairRows
// of them, by hash, the newest pair evicting the one before it.
class Adjacency : public Source {
 public:
  static constexpr int kRanks = 3;  // ranks from here on are one kind
  static constexpr int kPairBits = 16;
  static constexpr int64_t kPairRows = int64_t{1} << kPairBits;

  // context: tokens that a row is for, 1 or 2.
  Adjacency(int64_t vocab, int context)
      : vocab(vocab),
        context(context),
        rows(context == 1 ? vocab : kPairRows),
        keys(rows, -1),
        successors(rows * kTop, -1),
        levels(rows * kTop, 0) {}

  std::vector<double> priors() const override {
    std::vector<double> priors{0};
    for (int rank = 0; rank < kRanks; ++rank) {
      priors.insert(priors.end(), kPriorByLevel, kPriorByLevel + kLevels);
    }
    return priors;
  }

  // tokens, parents [nodes] of a tree; previous is the token before the root, -1 if there is none;
  // top_tokens, top_logits [nodes, kTop], best first, token -1 where there is none. The last node of a key
  // wins.
  void update(const int64_t* tokens, const int32_t* parents, int64_t previous, const int32_t* top_tokens,
              const float* top_logits, int64_t nodes) {
    for (int64_t node = 0; node < nodes; ++node) {
      const int64_t key = key_of(node > 0 ? tokens[parents[node]] : previous, tokens[node]);
      if (key < 0) continue;
      const int64_t row = row_of(key);
      const float* logits = top_logits + node * kTop;
      double weights[kTop];
      double total = 0;
      for (int rank = 0; rank < kTop; ++rank) {
        weights[rank] = std::exp(static_cast<double>(logits[rank]) - static_cast<double>(logits[0]));
        total += weights[rank];
      }
      keys[row] = key;
      for (int rank = 0; rank < kTop; ++rank) {
        successors[row * kTop + rank] = top_tokens[node * kTop + rank];
        levels[row * kTop + rank] = level_of(weights[rank] / total);
      }
    }
  }

  void offer(const int32_t* recent, int64_t length, const Draw& draw,
             std::vector<Offer>& offers) const override {
    const int64_t key = key_of(length > 1 ? recent[length - 2] : -1, recent[length - 1]);
    if (key < 0 || keys[row_of(key)] != key) return;
    const int64_t first = row_of(key) * kTop;
    const int32_t* tokens = successors.data() + first;
    double weights[kTop];
    int known = 0;
    for (; known < kTop && tokens[known] >= 0; ++known) weights[known] = kShareOfLevel[levels[first + known]];
    const auto order = ranked(draw, tokens, weights, known);
    for (int rank = 0; rank < known; ++rank) {
      const int level = draw.noise ? level_of(weights[order[rank]]) : levels[first + rank];
      offers.push_back({tokens[order[rank]], 1 + (rank < kRanks ? rank : kRanks - 1) * kLevels + level});
    }
  }

  const int64_t vocab;
  const int context;
  const int64_t rows;
  std::vector<int64_t> keys;        // [rows], -1 where nothing is known
  std::vector<int32_t> successors;  // [rows, kTop], -1 behind the last
  std::vector<uint8_t> levels;      // [rows, kTop], 0 is surest

 private:
  int64_t key_of(int64_t previous, int64_t token) const {
    if (context == 1) return token;
    return previous < 0 ? -1 : previous * vocab + token;
  }

  int64_t row_of(int64_t key) const {
    if (context == 1) return key;
    return static_cast<int64_t>((static_cast<uint64_t>(key) * 0x9E3779B97F4A7C15ull) >> (64 - kPairBits));
  }
};

}  // namespace pyspec
