// Rows by key, a bounded number of them.
#pragma once

#include <algorithm>
#include <cstdint>
#include <unordered_map>
#include <utility>

namespace pyspec {

// The key of an n-gram that an earlier token makes longer; 0 is that of the empty one. A key is a hash: two
// n-grams that share one cost a bad guess, never a wrong text.
inline uint64_t longer_key(uint64_t key, int32_t earlier) {
  key = (key ^ (static_cast<uint64_t>(earlier) + 1)) * 0x9E3779B97F4A7C15ull;
  return key ^ (key >> 29);
}

// At most capacity rows, in two halves. What is written moves to the newer half; when that is full, the older
// one is forgotten and the newer one takes its place. So what was not written lately goes first.
template <typename Row>
class Generations {
 public:
  using Rows = std::unordered_map<uint64_t, Row>;

  explicit Generations(int64_t capacity) : half_(static_cast<size_t>(std::max<int64_t>(1, capacity / 2))) {}

  const Row* find(uint64_t key) const {
    for (const Rows* rows : {&newer, &older}) {
      const auto found = rows->find(key);
      if (found != rows->end()) return &found->second;
    }
    return nullptr;
  }

  // The row to write to, made if it is not there.
  Row& row(uint64_t key) {
    const auto found = newer.find(key);
    if (found != newer.end()) return found->second;
    Row moved{};
    const auto aged = older.find(key);
    if (aged != older.end()) {
      moved = std::move(aged->second);
      older.erase(aged);
    }
    if (newer.size() == half_) {
      older = std::move(newer);
      newer = Rows();
    }
    return newer.emplace(key, std::move(moved)).first->second;
  }

  int64_t size() const { return static_cast<int64_t>(newer.size() + older.size()); }

  Rows newer, older;

 private:
  size_t half_;
};

}  // namespace pyspec
