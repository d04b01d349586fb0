// N-Grammys: what the target says after a token alone, computed once.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "growth.h"
#include "params/row_statistics.h"

namespace pyspec {

// Stewart et al., "The N-Grammys", arXiv 2411.03786: the kTop best tokens after each token, and behind them
// the tokens that come after most tokens. Asked again at every node, it is their extended bigram too.
class Bigrams : public Source {
 public:
  // successors [vocab, kTop], best first, -1 behind the last; common: tokens, the commonest first.
  Bigrams(std::vector<int32_t> successors, std::vector<int32_t> common)
      : successors_(std::move(successors)), common_(std::move(common)) {
    common_.resize(std::min<size_t>(common_.size(), kTop));
  }

  std::vector<double> priors() const override {
    std::vector<double> priors{0};
    for (int rank = 0; rank < kTop; ++rank) priors.push_back(0.25 / (1 + rank));
    for (int rank = 0; rank < kTop; ++rank) priors.push_back(0.04 / (1 + rank));
    return priors;
  }

  void offer(const int32_t* recent, int64_t length, const Draw&, std::vector<Offer>& offers) const override {
    const int32_t* row = successors_.data() + static_cast<int64_t>(recent[length - 1]) * kTop;
    for (int rank = 0; rank < kTop && row[rank] >= 0; ++rank) offers.push_back({row[rank], 1 + rank});
    for (size_t rank = 0; rank < common_.size(); ++rank) {
      if (std::find(row, row + kTop, common_[rank]) != row + kTop) continue;
      offers.push_back({common_[rank], 1 + kTop + static_cast<int32_t>(rank)});
    }
  }

 private:
  std::vector<int32_t> successors_, common_;
};

}  // namespace pyspec
