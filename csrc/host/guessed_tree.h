// A tree that somebody else has guessed below the text, say a trained head, as a source among others.
#pragma once

#include <cstdint>
#include <utility>
#include <vector>

#include "coupling.h"
#include "growth.h"
#include "levels.h"

namespace pyspec {

// Offers the children of the node that the newest tokens lead to. A kind is the rank among siblings, how sure
// the guesser was of it, and whether it was guessed below a guess: those know less than they say.
class GuessedTree : public Source {
 public:
  static constexpr int kRanks = 3;  // ranks from here on are one kind

  std::vector<double> priors() const override {
    std::vector<double> priors{0};
    for (int kind = 0; kind < 2 * kRanks; ++kind) {
      priors.insert(priors.end(), kShareOfLevel, kShareOfLevel + kLevels);
    }
    return priors;
  }

  // tokens, parents, chances [nodes] of a tree, where likelier siblings come first; length: of the tokens up
  // to its root, as `offer` will be given them.
  void hold(std::vector<int32_t> tokens, std::vector<int32_t> parents, std::vector<float> chances,
            int64_t length) {
    tokens_ = std::move(tokens), parents_ = std::move(parents), chances_ = std::move(chances);
    length_ = length;
  }

  void offer(const int32_t* recent, int64_t length, const Draw& draw,
             std::vector<Offer>& offers) const override {
    const int nodes = static_cast<int>(tokens_.size());
    int node = 0;
    for (int64_t at = length_; at < length && node < nodes; ++at) {
      int child = node + 1;
      while (child < nodes && !(parents_[child] == node && tokens_[child] == recent[at])) ++child;
      node = child;
    }
    if (node >= nodes) return;
    std::vector<int32_t> tokens;
    std::vector<double> shares;
    for (int child = node + 1; child < nodes; ++child) {
      if (parents_[child] != node) continue;
      tokens.push_back(tokens_[child]);
      shares.push_back(static_cast<double>(chances_[child]) / static_cast<double>(chances_[node]));
    }
    const int count = static_cast<int>(tokens.size());
    const auto order = ranked(draw, tokens.data(), shares.data(), count);
    for (int rank = 0; rank < count; ++rank) {
      const int kind = (rank < kRanks ? rank : kRanks - 1) + (node ? kRanks : 0);
      offers.push_back({tokens[order[rank]], 1 + kind * kLevels + level_of(shares[order[rank]])});
    }
  }

 private:
  std::vector<int32_t> tokens_, parents_;
  std::vector<float> chances_;
  int64_t length_ = 0;
};

}  // namespace pyspec
