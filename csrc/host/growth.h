// Best-first growth of a draft tree from any number of sources, and what verification has taught about them.
#pragma once

#include <cstddef>
#include <cstdint>
#include <queue>
#include <utility>
#include <vector>

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
  // Appends what may follow the tokens in recent [length], the newest last; no token twice.
  virtual void offer(const int32_t* recent, int64_t length, std::vector<Offer>& offers) const = 0;
};

// How often offers of each kind turned out to be what the target said.
//
// A cell is one combination of the sources' features, feature 0 of a source meaning that it did not offer the
// token. Cells where one source alone offered are smoothed towards that feature's prior; the other cells
// towards the chance that at least one of several independent offers is right.
class Estimates {
 public:
  Estimates(std::vector<std::vector<double>> priors, double smoothing)
      : priors_(std::move(priors)), smoothing_(smoothing) {
    int64_t cells = 1;
    for (const auto& prior : priors_) {
      strides_.push_back(cells);
      cells *= static_cast<int64_t>(prior.size());
    }
    hits.assign(cells, 0);
    trials.assign(cells, 0);
  }

  int sources() const { return static_cast<int>(strides_.size()); }
  int64_t stride(int source) const { return strides_[source]; }

  double rate(int64_t cell) const {
    double missed = 1;
    int offering = 0;
    for (int source = 0; source < sources(); ++source) {
      const int64_t feature = feature_of(cell, source);
      if (feature == 0) continue;
      const int64_t alone = feature * strides_[source];
      missed *= 1 - smoothed(alone, priors_[source][feature]);
      ++offering;
    }
    return offering == 1 ? 1 - missed : smoothed(cell, 1 - missed);
  }

  void learn(int64_t cell, bool hit) {
    int offering = 0;
    for (int source = 0; source < sources(); ++source) {
      const int64_t feature = feature_of(cell, source);
      if (feature == 0) continue;
      count(feature * strides_[source], hit);
      ++offering;
    }
    if (offering > 1) count(cell, hit);
  }

  std::vector<double> hits, trials;  // [cells]

 private:
  int64_t feature_of(int64_t cell, int source) const {
    return cell / strides_[source] % static_cast<int64_t>(priors_[source].size());
  }
  double smoothed(int64_t cell, double prior) const {
    return (hits[cell] + smoothing_ * prior) / (trials[cell] + smoothing_);
  }
  void count(int64_t cell, bool hit) {
    hits[cell] += hit;
    trials[cell] += 1;
  }

  std::vector<std::vector<double>> priors_;  // [sources][features], feature 0 unused
  std::vector<int64_t> strides_;
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
inline GrownTree grow(const std::vector<const Source*>& sources, const Estimates& estimates,
                      const std::vector<int32_t>& recent, int budget) {
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
      sources[source]->offer(history.data(), static_cast<int64_t>(history.size()), offers);
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
