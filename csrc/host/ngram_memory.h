// STAND: what the target thought after an n-gram, on average.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <vector>

#include "coupling.h"
#include "generations.h"
#include "growth.h"
#include "levels.h"
#include "params/row_statistics.h"

namespace pyspec {

// Song et al., "Accelerated Test-Time Scaling with Model-Free Speculative Sampling", arXiv 2506.04708: for
// every n-gram, n = 1..kMaxOrder, the mean of the laws that the target had after it, cut to its kTop best
// tokens.
class NgramMemory : public Source {
 public:
  static constexpr int kMaxOrder = 4;
  static constexpr int kRanks = 3;         // ranks from here on are one kind
  static constexpr double kShorter = 0.5;  // laws that all shorter n-grams together are worth

  struct Row {
    int32_t count = 0;
    int32_t tokens[kTop];
    float shares[kTop];  // falling
    int32_t size = 0;
  };

  explicit NgramMemory(int64_t capacity) : rows(capacity) {}

  std::vector<double> priors() const override {
    std::vector<double> priors{0};
    for (int kind = 0; kind < kMaxOrder * kRanks; ++kind) {
      priors.insert(priors.end(), kPriorByLevel, kPriorByLevel + kLevels);
    }
    return priors;
  }

  // tokens, parents [nodes] of a tree; before [length] the tokens before its root; top_tokens, top_logits
  // [nodes, kTop], best first, token -1 where there is none.
  void update(const int64_t* tokens, const int32_t* parents, const int32_t* before, int64_t length,
              const int32_t* top_tokens, const float* top_logits, int64_t nodes) {
    for (int64_t node = 0; node < nodes; ++node) {
      const float* logits = top_logits + node * kTop;
      double shares[kTop];
      double total = 0;
      for (int rank = 0; rank < kTop; ++rank) {
        shares[rank] = std::exp(static_cast<double>(logits[rank]) - static_cast<double>(logits[0]));
        total += shares[rank];
      }
      if (!std::isfinite(total)) continue;  // no law
      for (double& share : shares) share /= total;
      uint64_t key = 0;
      int64_t at = node, outside = length;
      for (int order = 1; order <= kMaxOrder; ++order) {
        if (at < 0 && outside == 0) break;
        const auto earlier = static_cast<int32_t>(at >= 0 ? tokens[at] : before[--outside]);
        if (at >= 0) at = parents[at];
        key = longer_key(key, earlier);
        merge(rows.row(key), top_tokens + node * kTop, shares);
      }
    }
  }

  void offer(const int32_t* recent, int64_t length, const Draw& draw,
             std::vector<Offer>& offers) const override {
    int32_t tokens[kMaxOrder * kTop];
    double shares[kMaxOrder * kTop];
    int size = 0, orders = 0;
    uint64_t key = 0;
    for (; orders < kMaxOrder && orders < length; ++orders) {
      key = longer_key(key, recent[length - 1 - orders]);
      const Row* row = rows.find(key);
      if (!row) break;
      const double weight = orders == 0 ? 1 : row->count / (row->count + kShorter);
      for (int i = 0; i < size; ++i) shares[i] *= 1 - weight;
      for (int rank = 0; rank < row->size; ++rank) {
        const int at = static_cast<int>(std::find(tokens, tokens + size, row->tokens[rank]) - tokens);
        if (at == size) {
          tokens[size] = row->tokens[rank];
          shares[size++] = 0;
        }
        shares[at] += weight * row->shares[rank];
      }
    }
    const auto order = ranked(draw, tokens, shares, size);
    for (int rank = 0; rank < size; ++rank) {
      const int kind = (orders - 1) * kRanks + std::min(rank, kRanks - 1);
      offers.push_back({tokens[order[rank]], 1 + kind * kLevels + level_of(shares[order[rank]])});
    }
  }

  Generations<Row> rows;

 private:
  // Tokens that were cut off count as 0; of equal shares the known token stays before a new one.
  static void merge(Row& row, const int32_t* tokens, const double* shares) {
    struct Entry {
      int32_t token;
      float share;
    };
    Entry entries[2 * kTop];
    int size = 0;
    const double count = row.count, all = count + 1;
    for (int rank = 0; rank < row.size; ++rank) {
      const auto* same = std::find(tokens, tokens + kTop, row.tokens[rank]);
      const double now = same == tokens + kTop ? 0 : shares[same - tokens];
      entries[size++] = {row.tokens[rank], static_cast<float>((count * row.shares[rank] + now) / all)};
    }
    for (int rank = 0; rank < kTop && tokens[rank] >= 0; ++rank) {
      if (std::find(row.tokens, row.tokens + row.size, tokens[rank]) != row.tokens + row.size) continue;
      entries[size++] = {tokens[rank], static_cast<float>(shares[rank] / all)};
    }
    std::stable_sort(entries, entries + size,
                     [](const Entry& a, const Entry& b) { return a.share > b.share; });
    row.size = std::min(size, kTop);
    for (int rank = 0; rank < row.size; ++rank) {
      row.tokens[rank] = entries[rank].token;
      row.shares[rank] = entries[rank].share;
    }
    ++row.count;
  }
};

}  // namespace pyspec
