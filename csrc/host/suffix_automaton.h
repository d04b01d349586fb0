// Suffix lookup: what followed the longest earlier occurrence of the newest tokens, in many texts.
#pragma once

#include <algorithm>
#include <cstdint>
#include <utility>
#include <vector>

#include "growth.h"

namespace pyspec {

// A suffix automaton of several texts: every string in them is a path from state 0, states are sets of
// strings that end at the same places, and a state's link leads to the longest of their suffixes that ends at
// more places. With n tokens it has at most 2 n states and 3 n transitions, whatever the length of the
// matches.
class Automaton {
 public:
  Automaton() : states_(1) {}

  int64_t tokens() const { return tokens_; }
  int32_t link(int32_t state) const { return states_[state].link; }
  int32_t length(int32_t state) const { return states_[state].length; }
  int32_t count(int32_t state) const { return states_[state].count; }

  // Where a token leads, -1 for nowhere.
  int32_t next(int32_t state, int32_t token) const {
    if (table_.empty()) return -1;
    const int32_t found = table_[slot(state, token)];
    return found < 0 ? -1 : transitions_[found].to;
  }

  // Calls what(token, state) for the first known followers of a state: the frequent ones are mostly among
  // them.
  template <typename What>
  void followers(int32_t state, int most, What what) const {
    for (int32_t at = states_[state].first; at >= 0 && most > 0; at = transitions_[at].after, --most) {
      what(transitions_[at].token, transitions_[at].to);
    }
  }

  // The state of a text that goes on from `last` with token.
  int32_t add(int32_t last, int32_t token) {
    ++tokens_;
    int32_t state = next(last, token);
    if (state >= 0) {
      if (states_[state].length != states_[last].length + 1) state = split(last, token, state);
    } else {
      state = static_cast<int32_t>(states_.size());
      states_.push_back({states_[last].length + 1, 0, -1, -1, 0});
      int32_t at = last;
      while (at >= 0 && next(at, token) < 0) {
        connect(at, token, state);
        at = states_[at].link;
      }
      if (at >= 0) {
        int32_t known = next(at, token);
        if (states_[known].length != states_[at].length + 1) known = split(at, token, known);
        states_[state].link = known;
      }
    }
    for (int32_t at = state; at > 0; at = states_[at].link) ++states_[at].count;
    return state;
  }

 private:
  struct State {
    int32_t length = 0;  // of its longest string
    int32_t link = -1;
    int32_t first = -1, last = -1;  // of its transitions, in the order in which they were met
    int32_t count = 0;              // of places where its strings end
  };
  struct Transition {
    int32_t state, token, to, after;
  };

  // The strings of `state` that are not longer than one token after `from` get a state of their own.
  int32_t split(int32_t from, int32_t token, int32_t state) {
    const auto copy = static_cast<int32_t>(states_.size());
    states_.push_back({states_[from].length + 1, states_[state].link, -1, -1, states_[state].count});
    std::vector<std::pair<int32_t, int32_t>> edges;
    followers(state, INT32_MAX, [&](int32_t edge, int32_t to) { edges.emplace_back(edge, to); });
    for (const auto& [edge, to] : edges) connect(copy, edge, to);
    states_[state].link = copy;
    for (int32_t at = from; at >= 0 && next(at, token) == state; at = states_[at].link) {
      transitions_[table_[slot(at, token)]].to = copy;
    }
    return copy;
  }

  void connect(int32_t state, int32_t token, int32_t to) {
    const auto added = static_cast<int32_t>(transitions_.size());
    transitions_.push_back({state, token, to, -1});
    State& from = states_[state];
    (from.first < 0 ? from.first : transitions_[from.last].after) = added;
    from.last = added;
    if (2 * transitions_.size() > table_.size()) {
      table_.assign(std::max<size_t>(64, 2 * table_.size()), -1);
      for (size_t at = 0; at < transitions_.size(); ++at) {
        table_[slot(transitions_[at].state, transitions_[at].token)] = static_cast<int32_t>(at);
      }
    } else {
      table_[slot(state, token)] = added;
    }
  }

  // Where a transition is in the table, or would be.
  size_t slot(int32_t state, int32_t token) const {
    const uint64_t key = static_cast<uint64_t>(state) << 32 | static_cast<uint32_t>(token);
    // the upper half of the product: all bits of state and token reach it
    size_t at = ((key * 0x9E3779B97F4A7C15ull) >> 32) & (table_.size() - 1);
    while (table_[at] >= 0) {
      const Transition& other = transitions_[table_[at]];
      if (other.state == state && other.token == token) break;
      at = (at + 1) & (table_.size() - 1);
    }
    return at;
  }

  std::vector<State> states_;
  std::vector<Transition> transitions_;
  std::vector<int32_t> table_;  // open addressing over transitions
  int64_t tokens_ = 0;
};

// Two automata, of which the older is forgotten when the newer is full: at most capacity tokens are known.
class SuffixLookup : public Source {
 public:
  static constexpr int kLongestMatch = 32;
  static constexpr int kLengths = 8;   // kinds of matches by length
  static constexpr int kMaxCount = 3;  // counts from here on are one kind
  static constexpr size_t kMaxOffers = 16;
  static constexpr int kMaxMatches = 4;     // with followers, that are looked at
  static constexpr int kMaxFollowers = 32;  // of a match
  static constexpr int kPiece = 1024;       // tokens of one text read as one: bounds the cost of a token

  // Where a text goes on.
  struct Cursor {
    int64_t generation = -1;
    int32_t state = 0;
    int32_t length = 0;
  };

  explicit SuffixLookup(int64_t capacity) : half_(std::max<int64_t>(1, capacity / 2)) {}

  int64_t size() const { return newer_.tokens() + older_.tokens(); }

  std::vector<double> priors() const override {
    constexpr double kTrust[kLengths] = {0.3, 0.5, 0.66, 0.75, 0.82, 0.88, 0.93, 0.97};
    std::vector<double> priors{0};
    for (const double trust : kTrust) {
      for (int count = 1; count <= kMaxCount; ++count) {
        for (int others = 0; others <= kMaxCount; ++others) {
          priors.push_back(trust * count / (count + others + 0.3));
        }
      }
    }
    return priors;
  }

  // Reads what comes next of a text; where it goes on then.
  Cursor extend(Cursor cursor, const std::vector<int32_t>& tokens) {
    for (const int32_t token : tokens) {
      if (newer_.tokens() == half_) {
        older_ = std::move(newer_);
        newer_ = Automaton();
        ++generation_;
      }
      if (cursor.generation != generation_ || cursor.length == kPiece) cursor = {generation_, 0, 0};
      cursor.state = newer_.add(cursor.state, token);
      ++cursor.length;
    }
    return cursor;
  }

  // Longest match first; a shorter one adds only tokens that no longer one offered.
  void offer(const int32_t* recent, int64_t length, const Draw&, std::vector<Offer>& offers) const override {
    const int64_t taken = std::min<int64_t>(length, kLongestMatch);
    Match matches[2] = {longest(newer_, recent + length - taken, taken),
                        longest(older_, recent + length - taken, taken)};
    for (int looked_at = 0; looked_at < kMaxMatches && offers.size() < kMaxOffers;) {
      Match& best = matches[1].length > matches[0].length ? matches[1] : matches[0];
      if (best.length == 0) break;
      looked_at += add(best, offers);
      best.state = best.automaton->link(best.state);
      best.length = std::max(0, best.automaton->length(best.state));
    }
  }

 private:
  struct Match {
    const Automaton* automaton;
    int32_t state, length;
  };

  static Match longest(const Automaton& automaton, const int32_t* recent, int64_t length) {
    int32_t state = 0, matched = 0;
    for (int64_t at = 0; at < length; ++at) {
      int32_t to;
      while ((to = automaton.next(state, recent[at])) < 0 && state > 0) {
        state = automaton.link(state);
        matched = automaton.length(state);
      }
      if (to >= 0) {
        state = to;
        ++matched;
      }
    }
    return {&automaton, state, matched};
  }

  // Whether the match has followers.
  static bool add(const Match& match, std::vector<Offer>& offers) {
    struct Follower {
      int32_t token, count;
    };
    Follower found[kMaxFollowers];
    int size = 0, total = 0;
    match.automaton->followers(match.state, kMaxFollowers, [&](int32_t token, int32_t to) {
      found[size++] = {token, match.automaton->count(to)};
      total += found[size - 1].count;
    });
    std::stable_sort(found, found + size,
                     [](const Follower& a, const Follower& b) { return a.count > b.count; });
    for (int rank = 0; rank < size && offers.size() < kMaxOffers; ++rank) {
      const auto same = [&](const Offer& offer) { return offer.token == found[rank].token; };
      if (std::any_of(offers.begin(), offers.end(), same)) continue;
      const int count = std::min(found[rank].count, kMaxCount);
      const int others = std::min(total - found[rank].count, kMaxCount);
      const int kind = (kind_of_length(match.length) * kMaxCount + count - 1) * (kMaxCount + 1) + others;
      offers.push_back({found[rank].token, 1 + kind});
    }
    return size > 0;
  }

  static int kind_of_length(int32_t length) {
    constexpr int32_t kUpTo[kLengths - 1] = {1, 2, 3, 4, 6, 9, 16};
    int kind = 0;
    while (kind < kLengths - 1 && length > kUpTo[kind]) ++kind;
    return kind;
  }

  Automaton newer_, older_;
  int64_t half_;
  int64_t generation_ = 0;
};

}  // namespace pyspec
