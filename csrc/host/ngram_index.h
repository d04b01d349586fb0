// Prompt lookup: what followed earlier occurrences of the newest tokens.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <vector>

#include "generations.h"
#include "growth.h"

namespace pyspec {

// One sequence's n-grams, n = 0..kMaxOrder, each with the tokens that followed it. Every token follows the
// empty n-gram, so where nothing matches, the frequent tokens are offered. A key is the hash of the n-gram;
// two n-grams that share one cost a bad guess, never a wrong text.
class NgramIndex : public Source {
 public:
  static constexpr int kMaxOrder = 6;
  static constexpr int kMaxCount = 3;  // counts from here on are one kind
  static constexpr size_t kMaxOffers = 16;
  static constexpr size_t kMaxFollowers = 64;  // of one n-gram; bounds the cost of a token

  int64_t size() const { return static_cast<int64_t>(tokens_.size()); }

  std::vector<double> priors() const override {
    constexpr double kTrust[kMaxOrder + 1] = {0.08, 0.4, 0.66, 0.78, 0.82, 0.88, 0.97};
    std::vector<double> priors{0};
    for (int order = 0; order <= kMaxOrder; ++order) {
      for (int count = 1; count <= kMaxCount; ++count) {
        for (int others = 0; others <= kMaxCount; ++others) {
          priors.insert(priors.end(), 2, kTrust[order] * count / (count + others + 0.3));
        }
      }
    }
    return priors;
  }

  // Makes each token a follower of the n-grams before it.
  void extend(const std::vector<int32_t>& tokens) {
    for (const int32_t token : tokens) {
      uint64_t key = 0;
      followers_[key].add(token);
      for (int order = 1; order <= std::min<int64_t>(kMaxOrder, size()); ++order) {
        key = longer_key(key, tokens_[tokens_.size() - order]);
        followers_[key].add(token);
      }
      tokens_.push_back(token);
    }
  }

  // Longest match first; a shorter one adds only tokens that no longer one offered.
  void offer(const int32_t* recent, int64_t length, const Draw&, std::vector<Offer>& offers) const override {
    const Followers* matches[kMaxOrder + 1];
    int found = 0;
    uint64_t key = 0;
    while (found <= kMaxOrder) {
      const auto match = followers_.find(key);
      if (match == followers_.end()) break;
      matches[found++] = &match->second;
      if (found > length) break;
      key = longer_key(key, recent[length - found]);
    }
    for (int order = found - 1; order >= 0; --order) {
      const Followers& match = *matches[order];
      const size_t kept = std::min(kMaxOffers, match.ranked.size());
      for (size_t rank = 0; rank < kept; ++rank) {
        const Follower follower = match.ranked[rank];
        const auto same = [&](const Offer& offer) { return offer.token == follower.token; };
        if (std::any_of(offers.begin(), offers.end(), same)) continue;
        const int count = std::min(follower.count, kMaxCount);
        const int others = std::min(match.total - follower.count, kMaxCount);
        const int kind = (order * kMaxCount + count - 1) * (kMaxCount + 1) + others;
        offers.push_back({follower.token, 1 + kind * 2 + (follower.token == match.latest)});
      }
    }
  }

 private:
  struct Follower {
    int32_t token;
    int32_t count;
  };

  // What followed one n-gram: the most frequent first, then the most recent.
  struct Followers {
    std::vector<Follower> ranked;
    int32_t total = 0;
    int32_t latest = -1;

    void add(int32_t token) {
      const auto same = [&](const Follower& follower) { return follower.token == token; };
      auto found = std::find_if(ranked.begin(), ranked.end(), same);
      if (found == ranked.end()) {
        if (ranked.size() == kMaxFollowers) ranked.pop_back();
        found = ranked.insert(ranked.end(), {token, 0});
      }
      ++found->count;
      const auto passed = [&](const Follower& follower) { return follower.count <= found->count; };
      std::rotate(std::find_if(ranked.begin(), found, passed), found, found + 1);
      ++total;
      latest = token;
    }
  };

  std::vector<int32_t> tokens_;
  std::unordered_map<uint64_t, Followers> followers_;
};

}  // namespace pyspec
