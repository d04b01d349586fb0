// ADED: which tokens followed two others, in texts and lately.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "generations.h"
#include "growth.h"
#include "levels.h"

namespace pyspec {

// Liu et al., "Adaptive Draft-Verification for Efficient Large Language Model Decoding", arXiv 2407.12021: a
// follower's score is its share in the texts read, and a bonus for each round in which it stands in the
// newest kWindow tokens.
class Trigrams : public Source {
 public:
  static constexpr int kFollowers = 12;
  static constexpr int kWindow = 16;
  static constexpr float kBonus = 0.04f, kMostBonus = 3.0f;
  static constexpr int kBonuses = 4;  // kinds: none, below 0.5, below 1.5, more

  struct Follower {
    int32_t token;
    int32_t count;
    float bonus;
  };
  struct Row {
    int32_t total = 0;  // counts of all, also of those that were cut off
    std::vector<Follower> followers;
  };

  explicit Trigrams(int64_t capacity) : rows(capacity) {}

  std::vector<double> priors() const override {
    std::vector<double> priors{0};
    for (int bonus = 0; bonus < kBonuses; ++bonus) {
      priors.insert(priors.end(), kPriorByLevel, kPriorByLevel + kLevels);
    }
    return priors;
  }

  // Counts the tokens from `first` on.
  void extend(const std::vector<int32_t>& tokens, int64_t first) {
    for (size_t at = std::max<int64_t>(first, 2); at < tokens.size(); ++at) {
      Row& row = rows.row(key_of(tokens[at - 2], tokens[at - 1]));
      ++row.total;
      ++follower(row, tokens[at]).count;
    }
  }

  // A bonus for every trigram of the newest tokens.
  void reward(const std::vector<int32_t>& tokens) {
    const auto first = std::max<int64_t>(0, static_cast<int64_t>(tokens.size()) - kWindow);
    for (size_t at = first + 2; at < tokens.size(); ++at) {
      Follower& found = follower(rows.row(key_of(tokens[at - 2], tokens[at - 1])), tokens[at]);
      found.bonus = std::min(found.bonus + kBonus, kMostBonus);
    }
  }

  void offer(const int32_t* recent, int64_t length, const Draw&, std::vector<Offer>& offers) const override {
    const Row* row = length < 2 ? nullptr : rows.find(key_of(recent[length - 2], recent[length - 1]));
    if (!row) return;
    for (const Follower& follower : row->followers) {
      const int bonus = follower.bonus == 0 ? 0 : follower.bonus < 0.5f ? 1 : follower.bonus < 1.5f ? 2 : 3;
      const double share = static_cast<double>(follower.count) / std::max(row->total, 1);
      offers.push_back({follower.token, 1 + bonus * kLevels + level_of(share)});
    }
  }

  Generations<Row> rows;

 private:
  static uint64_t key_of(int32_t first, int32_t second) { return longer_key(longer_key(0, second), first); }

  // A new one takes the place of the first of those with the lowest score.
  static Follower& follower(Row& row, int32_t token) {
    const auto same = [&](const Follower& follower) { return follower.token == token; };
    auto found = std::find_if(row.followers.begin(), row.followers.end(), same);
    if (found != row.followers.end()) return *found;
    if (row.followers.size() < kFollowers) return row.followers.emplace_back(Follower{token, 0, 0});
    const double total = std::max(row.total, 1);
    const auto less = [&](const Follower& a, const Follower& b) {
      return a.count / total + static_cast<double>(a.bonus) < b.count / total + static_cast<double>(b.bonus);
    };
    found = std::min_element(row.followers.begin(), row.followers.end(), less);
    return *found = Follower{token, 0, 0};
  }
};

}  // namespace pyspec
