// A round of a trained head: the trees of some texts grow level by level, each by one recorded call of the
// head, and nothing else runs between two calls. drafters/shapes/reranked.py says which nodes are taken.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <map>
#include <numeric>
#include <stdexcept>
#include <utility>
#include <vector>

namespace pyspec {

// A recorded call for so many rows: where it reads what changes, and where it leaves what the head said.
struct HeadCall {
  int32_t *tokens, *positions, *slots, *sequences;  // [rows]
  int32_t* bits;                                    // [rows, words]
  int32_t *starts, *prefixes;                       // [sequences + 1], [sequences]
  float* rows;                                      // [rows, width]: taps, or what the head gave before
  const float* given;                               // [rows, hidden]
  const int64_t* top_tokens;                        // [rows, kTopGuesses]
  const float *top_logits, *log_sum_exp;            // [rows, kTopGuesses], [rows]
  void* tape;
  int64_t words, width;
};

constexpr int64_t kTopGuesses = 8;

// What a head said after a row: its likeliest tokens and their chances, and what guesses below take in.
struct HeadSaid {
  int64_t tokens[kTopGuesses] = {};
  double chances[kTopGuesses] = {};
  std::vector<float> given;

  void take(const HeadCall& call, int64_t row, int64_t hidden) {
    for (int64_t i = 0; i < kTopGuesses; ++i) {
      tokens[i] = call.top_tokens[row * kTopGuesses + i];
      chances[i] = std::exp(call.top_logits[row * kTopGuesses + i] - call.log_sum_exp[row]);
    }
    given.assign(call.given + row * hidden, call.given + (row + 1) * hidden);
  }
};

// The calls of a head that were recorded for a batch of so many sequences.
struct HeadCalls {
  enum Kind { kEnd, kGuess };  // rows of the text, of which the head is told the taps; guesses
  using Run = const char* (*)(void* tape, void* arena);

  int64_t sequences, hidden;
  Run run;
  std::vector<int64_t> target_tokens;  // of the head's; empty where they are the same
  std::map<std::pair<int, int64_t>, HeadCall> calls;

  int64_t target_token(int64_t token) const { return target_tokens.empty() ? token : target_tokens[token]; }

  const HeadCall* find(Kind kind, int64_t rows) const {
    auto found = calls.find({kind, rows});
    return found == calls.end() ? nullptr : &found->second;
  }
};

// The tree of one text while it grows.
struct HeadTree {
  int64_t sequence, length, budget, token;  // length: committed rows; token: the target's, of the tree's root
  std::vector<int32_t> text;                // tokens of rows that are to be committed first, and their taps
  const float* taps;
  HeadSaid* root;  // of the text as a whole

  std::vector<int64_t> tokens{0};  // the head's; the root may be none of them
  std::vector<int32_t> parents{-1}, depths{-1},
      places{-1};  // place: behind the text, of a node that was read
  std::vector<double> chances{1.0};
  std::vector<uint64_t> bits{0};
  std::vector<HeadSaid> said;  // by place
  std::vector<int> level{0}, kept{0};

  const HeadSaid& said_of(int node) const { return node ? said[places[node]] : *root; }

  // Adds the likeliest children of the level's nodes, and makes those of them the level that are worth it.
  void grow(int width, double least) {
    const int first = static_cast<int>(tokens.size());
    for (int node : level) {
      const HeadSaid& of_node = said_of(node);
      for (int i = 0; i < width && of_node.chances[i] > 0; ++i) {
        tokens.push_back(of_node.tokens[i]);
        parents.push_back(node), depths.push_back(depths[node] + 1), places.push_back(-1);
        chances.push_back(chances[node] * of_node.chances[i]);
        bits.push_back(bits[node]);
      }
    }
    kept.resize(tokens.size());
    std::iota(kept.begin(), kept.end(), 0);
    std::stable_sort(kept.begin(), kept.end(), [&](int a, int b) { return chances[a] > chances[b]; });
    if (static_cast<int64_t>(kept.size()) > budget) kept.resize(budget);
    level.clear();
    double worth = 0;
    for (int node : kept) {
      if (node < first || static_cast<int>(level.size()) == width) continue;
      level.push_back(node), worth += chances[node];
    }
    std::sort(level.begin(), level.end());
    if (worth < least) level.clear();
  }
};

class HeadRound {
 public:
  HeadRound(const HeadCalls& calls, int width, int depth, double least)
      : calls_(calls), width_(width), depth_(depth), least_(least) {
    if (width < 1 || width > kTopGuesses || depth < 1 || width * (depth - 1) > 64)
      throw std::invalid_argument("width must be in [1, 8] and width * (depth - 1) at most 64");
  }

  // Trees by sequence, ascending.
  std::vector<HeadTree> trees;

  // Grows the trees to their ends. Where a call was not recorded, its kind and rows come back, and another
  // `run` goes on from there; else rows are 0.
  std::pair<int, int64_t> run(void* arena) {
    if (!has_read_) {
      int64_t rows = 0;
      for (const HeadTree& tree : trees) rows += static_cast<int64_t>(tree.text.size());
      if (rows) {
        const HeadCall* call = calls_.find(HeadCalls::kEnd, rows);
        if (!call) return {HeadCalls::kEnd, rows};
        read(*call, arena);
      }
      has_read_ = true;
      for (HeadTree& tree : trees)
        if (tree.budget <= 1) tree.level.clear();
    }
    for (; levels_ < depth_; ++levels_) {
      int64_t rows = 0;
      for (const HeadTree& tree : trees)
        if (levels_) rows += static_cast<int64_t>(tree.level.size());
      if (rows) {
        const HeadCall* call = calls_.find(HeadCalls::kGuess, rows);
        if (!call) return {HeadCalls::kGuess, rows};
        guess(*call, arena);
      } else if (levels_) {
        break;
      }
      for (HeadTree& tree : trees)
        if (!tree.level.empty()) tree.grow(width_, least_);
    }
    return {0, 0};
  }

  int levels() const { return levels_; }
  const HeadCalls& calls() const { return calls_; }

 private:
  void read(const HeadCall& call, void* arena) {
    int64_t row = 0;
    begin(call);
    for (HeadTree& tree : trees) {
      const auto count = static_cast<int64_t>(tree.text.size());
      call.prefixes[tree.sequence] = static_cast<int32_t>(tree.length);
      for (int64_t i = 0; i < count; ++i, ++row) {
        set(call, row, tree, tree.text[i], tree.length + i, tree.length + i);
        set_bits(call, row, i < 63 ? (uint64_t{2} << i) - 1 : ~uint64_t{0});
      }
      std::copy(tree.taps, tree.taps + count * call.width, call.rows + (row - count) * call.width);
      end_tree(call, tree, row);
    }
    play(call, arena);
    row = 0;
    for (HeadTree& tree : trees) {
      row += static_cast<int64_t>(tree.text.size()), tree.length += static_cast<int64_t>(tree.text.size());
      if (!tree.text.empty()) tree.root->take(call, row - 1, calls_.hidden);
    }
  }

  void guess(const HeadCall& call, void* arena) {
    int64_t row = 0;
    begin(call);
    for (HeadTree& tree : trees) {
      call.prefixes[tree.sequence] = tree.level.empty() ? 0 : static_cast<int32_t>(tree.length);
      auto place = static_cast<int32_t>(tree.said.size());
      for (int node : tree.level) {
        tree.places[node] = place;
        tree.bits[node] |= uint64_t{1} << place;
        const int64_t token = calls_.target_token(tree.tokens[node]);
        set(call, row, tree, static_cast<int32_t>(token), tree.length + tree.depths[node],
            tree.length + place);
        set_bits(call, row, tree.bits[node]);
        const std::vector<float>& given = tree.said_of(tree.parents[node]).given;
        std::copy(given.begin(), given.end(), call.rows + row * call.width);
        ++row, ++place;
      }
      end_tree(call, tree, row);
    }
    play(call, arena);
    row = 0;
    for (HeadTree& tree : trees) {
      for (size_t i = 0; i < tree.level.size(); ++i, ++row) {
        tree.said.emplace_back();
        tree.said.back().take(call, row, calls_.hidden);
      }
    }
  }

  // All sequences sit out, until they are described.
  void begin(const HeadCall& call) {
    std::fill_n(call.starts, calls_.sequences + 1, 0);
    std::fill_n(call.prefixes, calls_.sequences, 0);
  }
  void set(const HeadCall& call, int64_t row, const HeadTree& tree, int32_t token, int64_t position,
           int64_t slot) {
    call.tokens[row] = token;
    call.positions[row] = static_cast<int32_t>(position), call.slots[row] = static_cast<int32_t>(slot);
    call.sequences[row] = static_cast<int32_t>(tree.sequence);
  }
  static void set_bits(const HeadCall& call, int64_t row, uint64_t bits) {
    for (int64_t word = 0; word < call.words; ++word)
      call.bits[row * call.words + word] = word < 2 ? static_cast<int32_t>(bits >> 32 * word) : 0;
  }
  void end_tree(const HeadCall& call, const HeadTree& tree, int64_t end) {
    std::fill(call.starts + tree.sequence + 1, call.starts + calls_.sequences + 1, static_cast<int32_t>(end));
  }
  void play(const HeadCall& call, void* arena) {
    if (const char* error = calls_.run(call.tape, arena)) throw std::runtime_error(error);
  }

  const HeadCalls& calls_;
  int width_, depth_;
  double least_;
  int levels_ = 0;
  bool has_read_ = false;
};

}  // namespace pyspec
