// Token Recycling: what the target last thought could follow a token.
#pragma once

#include <cmath>
#include <cstdint>
#include <vector>

#include "growth.h"
#include "top_tokens.h"

namespace pyspec {

// Luo et al., "Turning Trash into Treasure: Accelerating Inference of Large Language Models with Token Recycling",
// arXiv 2408.08696. Beyond the paper each successor carries a level of how sure the target was of it.
class Adjacency : public Source {
 public:
  static constexpr int kLevels = 10;
  static constexpr int kRanks = 3;  // ranks from here on are one kind

  explicit Adjacency(int64_t vocab) : vocab(vocab), successors(vocab * kTop, -1), levels(vocab * kTop, 0) {}

  std::vector<double> priors() const override {
    constexpr double kShares[kLevels] = {0.6, 0.55, 0.45, 0.35, 0.25, 0.15, 0.1, 0.06, 0.03, 0.015};
    std::vector<double> priors{0};
    for (int rank = 0; rank < kRanks; ++rank) priors.insert(priors.end(), kShares, kShares + kLevels);
    return priors;
  }

  // tokens [nodes]; top_tokens, top_logits [nodes, kTop], best first, token -1 where there is none. The last
  // node of a token wins.
  void update(const int64_t* tokens, const int32_t* top_tokens, const float* top_logits, int64_t nodes) {
    for (int64_t node = 0; node < nodes; ++node) {
      const int64_t row = tokens[node] * kTop;
      const float* logits = top_logits + node * kTop;
      double weights[kTop];
      double total = 0;
      for (int rank = 0; rank < kTop; ++rank) {
        weights[rank] = std::exp(static_cast<double>(logits[rank]) - static_cast<double>(logits[0]));
        total += weights[rank];
      }
      for (int rank = 0; rank < kTop; ++rank) {
        successors[row + rank] = top_tokens[node * kTop + rank];
        levels[row + rank] = level(weights[rank] / total);
      }
    }
  }

  void offer(const int32_t* recent, int64_t length, std::vector<Offer>& offers) const override {
    const int64_t row = static_cast<int64_t>(recent[length - 1]) * kTop;
    for (int rank = 0; rank < kTop && successors[row + rank] >= 0; ++rank) {
      const int kind = (rank < kRanks ? rank : kRanks - 1) * kLevels + levels[row + rank];
      offers.push_back({successors[row + rank], 1 + kind});
    }
  }

  int64_t vocab;
  std::vector<int32_t> successors;  // [vocab, kTop], -1 where nothing is known
  std::vector<uint8_t> levels;      // [vocab, kTop], 0 is surest

 private:
  static uint8_t level(double share) {
    constexpr double kAbove[kLevels - 1] = {0.95, 0.85, 0.7, 0.5, 0.35, 0.22, 0.13, 0.07, 0.03};
    uint8_t level = 0;
    while (level < kLevels - 1 && !(share > kAbove[level])) ++level;
    return level;
  }
};

}  // namespace pyspec
