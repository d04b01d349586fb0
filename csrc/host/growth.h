// Best-first growth of a draft tree from any number of sources, and what verification has taught about them.
#pragma once

#include <algorithm>
#include <cstddef>
#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

#include "coupling.h"

namespace pyspec {

// A token that a source offers as the next one. The feature, from 1 on, says what kind of offer it is.
struct Offer {
  int32_t token;
  int32_t feature;
};

class Source {
 public:
  virtual ~Source() = default;
  // For each feature, how often such an offer is right as far as is known beforehand; priors()[0] is not
  // used.
  virtual std::vector<double> priors() const = 0;
  // Appends what may follow the tokens in recent [length], the newest last; no token twice. The draw is that
  // of the token which is asked for.
  virtual void offer(const int32_t* recent, int64_t length, const Draw& draw,
                     std::vector<Offer>& offers) const = 0;
};

// How often offers of each kind turned out to be what the target emitted.
//
// A cell is one combination of the sources' features, feature 0 of a source meaning that it did not offer the
// token. Cells where one source alone offered are smoothed towards that feature's prior; the other cells
// towards the chance that at least one of the two best offers is right, as if these were independent: more
// sources rarely know more. Of those cells, which are many, the last one of every hash is known.
class Estimates {
 public:
  static constexpr int kCellBits = 16;

  Estimates(std::vector<std::vector<double>> priors, double smoothing)
      : priors_(std::move(priors)), smoothing_(smoothing) {
    int64_t cells = 1, features = 0;
    for (const auto& prior : priors_) {
      strides_.push_back(cells);
      firsts_.push_back(features);
      cells *= static_cast<int64_t>(prior.size());
      features += static_cast<int64_t>(prior.size());
    }
    together_ = features;
    keys_.assign(int64_t{1} << kCellBits, -1);
    hits.assign(features + keys_.size(), 0);
    trials.assign(features + keys_.size(), 0);
  }

  int sources() const { return static_cast<int>(strides_.size()); }
  int64_t stride(int source) const { return strides_[source]; }

  double rate(int64_t cell) const {
    double best = 0, second = 0;
    int offering = 0;
    for (int source = 0; source < sources(); ++source) {
      const int64_t feature = feature_of(cell, source);
      if (feature == 0) continue;
      const double alone = smoothed(firsts_[source] + feature, priors_[source][feature]);
      second = std::max(second, std::min(best, alone));
      best = std::max(best, alone);
      ++offering;
    }
    if (offering == 1) return best;
    const double either = 1 - (1 - best) * (1 - second);
    const int64_t slot = slot_of(cell);
    return keys_[slot] == cell ? smoothed(together_ + slot, either) : either;
  }

  void learn(int64_t cell, bool hit) {
    int offering = 0;
    for (int source = 0; source < sources(); ++source) {
      const int64_t feature = feature_of(cell, source);
      if (feature == 0) continue;
      count(firsts_[source] + feature, hit);
      ++offering;
    }
    if (offering < 2) return;
    const int64_t slot = slot_of(cell);
    if (keys_[slot] != cell) {
      keys_[slot] = cell;
      hits[together_ + slot] = trials[together_ + slot] = 0;
    }
    count(together_ + slot, hit);
  }

  // [features of all sources, cells of several sources by hash]
  std::vector<double> hits, trials;

 private:
  int64_t feature_of(int64_t cell, int source) const {
    return cell / strides_[source] % static_cast<int64_t>(priors_[source].size());
  }
  static int64_t slot_of(int64_t cell) {
    return static_cast<int64_t>((static_cast<uint64_t>(cell) * 0x9E3779B97F4A7C15ull) >> (64 - kCellBits));
  }
  double smoothed(int64_t place, double prior) const {
    return (hits[place] + smoothing_ * prior) / (trials[place] + smoothing_);
  }
  void count(int64_t place, bool hit) {
    hits[place] += hit;
    trials[place] += 1;
  }

  std::vector<std::vector<double>> priors_;  // [sources][features], feature 0 unused
  std::vector<int64_t> strides_, firsts_;
  std::vector<int64_t> keys_;  // the cell that a hash stands for, -1 for none
  int64_t together_;           // where cells of several sources begin in hits and trials
  double smoothing_;
};

struct GrownTree {
  std::vector<int64_t> tokens;
  std::vector<int32_t> parents;
  std::vector<int64_t> cells;  // of the edge above each node
  std::vector<float> chances;  // that a node is on the accepted path; never more than an earlier node's
};

// Grows a tree below recent's newest token: the node most likely to be on the accepted path comes next, until
// there are budget nodes or nothing is offered. The same token offered by several sources is one node.
// position is that of the token after recent's newest, noise that of the draws, or null where the text is
// greedy.
inline GrownTree grow(const std::vector<const Source*>& sources, const Estimates& estimates,
                      const std::vector<int32_t>& recent, int budget, const SamplerNoise* noise,
                      int64_t position) {
  struct Candidate {
    double probability;  // product of the rates along the path
    int64_t order;       // of discovery: earlier first among equals
    int32_t token, parent;
    int64_t cell;
    bool operator<(const Candidate& other) const {
      return probability != other.probability ? probability < other.probability : order > other.order;
    }
  };
  GrownTree tree;
  std::priority_queue<Candidate> candidates;
  candidates.push({1.0, 0, recent.back(), -1, 0});
  int64_t discovered = 1;

  std::vector<int32_t> history;
  std::vector<int32_t> path;
  std::vector<Offer> offers;
  struct Child {
    int32_t token;
    int64_t cell;
  };
  std::vector<Child> children;
  while (!candidates.empty() && static_cast<int>(tree.tokens.size()) < budget) {
    const Candidate best = candidates.top();
    candidates.pop();
    const int node = static_cast<int>(tree.tokens.size());
    tree.tokens.push_back(best.token);
    tree.parents.push_back(best.parent);
    tree.cells.push_back(best.cell);
    tree.chances.push_back(static_cast<float>(best.probability));
    if (node + 1 == budget) break;

    path.clear();
    for (int at = node; at > 0; at = tree.parents[at]) path.push_back(static_cast<int32_t>(tree.tokens[at]));
    history = recent;
    history.insert(history.end(), path.rbegin(), path.rend());

    children.clear();
    for (int source = 0; source < estimates.sources(); ++source) {
      offers.clear();
      const Draw draw{noise, position + static_cast<int64_t>(path.size())};
      sources[source]->offer(history.data(), static_cast<int64_t>(history.size()), draw, offers);
      for (const Offer& offer : offers) {
        size_t at = 0;
        while (at < children.size() && children[at].token != offer.token) ++at;
        if (at == children.size()) children.push_back({offer.token, 0});
        children[at].cell += offer.feature * estimates.stride(source);
      }
    }
    for (const Child& child : children) {
      candidates.push(
          {best.probability * estimates.rate(child.cell), discovered++, child.token, node, child.cell});
    }
  }
  return tree;
}

}  // namespace pyspec
