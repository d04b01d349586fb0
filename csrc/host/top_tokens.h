// The best tokens of a row of logits, in one pass over it.
#pragma once

#include <cstdint>
#include <limits>

namespace pyspec {

constexpr int kTop = 8;

// row [vocab] -> tokens [kTop], logits [kTop], best first, lower token first among equals; -1 and -inf where
// the row has fewer than kTop tokens above -inf (NaN counts as -inf). Reading the row is the cost: a block is
// only looked into when some element beats the kTop-th best so far, which is rare after the first few blocks.
inline void top_tokens(const float* row, int64_t vocab, int32_t* tokens, float* logits) {
  constexpr int kBlock = 64;
  for (int rank = 0; rank < kTop; ++rank) {
    tokens[rank] = -1;
    logits[rank] = -std::numeric_limits<float>::infinity();
  }
  const auto insert = [&](int64_t token) {
    int rank = kTop - 1;
    for (; rank > 0 && row[token] > logits[rank - 1]; --rank) {
      logits[rank] = logits[rank - 1];
      tokens[rank] = tokens[rank - 1];
    }
    logits[rank] = row[token];
    tokens[rank] = static_cast<int32_t>(token);
  };
  int64_t begin = 0;
  for (; begin + kBlock <= vocab; begin += kBlock) {
    const float worst = logits[kTop - 1];
    int32_t better = 0;
    for (int i = 0; i < kBlock; ++i) better |= row[begin + i] > worst;
    if (!better) continue;
    for (int i = 0; i < kBlock; ++i) {
      if (row[begin + i] > logits[kTop - 1]) insert(begin + i);
    }
  }
  for (; begin < vocab; ++begin) {
    if (row[begin] > logits[kTop - 1]) insert(begin);
  }
}

}  // namespace pyspec
