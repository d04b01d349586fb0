// row_statistics on the CPU: a row of logits is read once, a block of 64 at a time.
//
// Top tokens: a block is looked into only if one of its logits beats the last of the best so far, which is
// rare after the first few blocks. Softmax: with m the largest logit so far, two sums are kept in each of 16
// lanes,
//   weights = sum e^(x - m),    weighted = sum (x - m) e^(x - m),
// and both are moved to a new m when one is found, which only a block that was looked into can bring. Then
// log_sum_exp = m + log(weights) and entropy = log(weights) - weighted / weights. Bound by the exponentials,
// about a cycle a logit. A row is one thread's work and its sums have one order: the row rule holds.
#include "params/row_statistics.h"

#include "cpu/simd.h"

namespace {

using pyspec::kTop;
using pyspec::RowStatisticsParams;

constexpr int kVectors = 4;
constexpr int64_t kBlock = 16 * kVectors;
constexpr int64_t kLogitsPerItem = 16384;  // a thread is not worth waking for fewer
constexpr float kLowest = -150.0f;         // e^-150 is 0 in fp32, and so is -150 e^-150: -inf adds nothing
constexpr float kSmallest = -3.40282347e38f;

struct Best {
  int64_t tokens[kTop];
  float logits[kTop];

  Best() {
    for (int rank = 0; rank < kTop; ++rank) tokens[rank] = -1, logits[rank] = -kInfinity;
  }

  // For logits above the last one. Tokens come in ascending order, so a newcomer goes behind its equals.
  void insert(int64_t token, float logit) {
    int rank = kTop - 1;
    for (; rank > 0 && logit > logits[rank - 1]; --rank) {
      logits[rank] = logits[rank - 1], tokens[rank] = tokens[rank - 1];
    }
    logits[rank] = logit, tokens[rank] = token;
  }

  // better: bit i of word v is set where logit 16 v + i of the block beat the last one before the block.
  template <class Storage>
  __attribute__((noinline)) void look_into(const Storage* block, int64_t first,
                                           const uint32_t (&better)[kVectors]) {
    for (int v = 0; v < kVectors; ++v) {
      for (uint32_t left = better[v]; left; left &= left - 1) {
        int64_t i = 16 * v + __builtin_ctz(left);
        float logit = to_float(block[i]);
        if (logit > logits[kTop - 1]) insert(first + i, logit);
      }
    }
  }
};

struct Sums {
  float shift = kSmallest;  // the largest logit so far
  F16 weights = set1(0.0f), weighted = set1(0.0f);

  PYSPEC_INLINE void move_to(float largest) {
    float change = shift - largest < kLowest ? kLowest : shift - largest, keep = __builtin_expf(change);
    weighted = mul(fma(set1(change), weights, weighted), set1(keep));
    weights = mul(weights, set1(keep));
    shift = largest;
  }
};

template <class Storage>
PYSPEC_INLINE void fold_block(const Storage* block, int64_t first, Best& best, Sums& sums) {
  F16 values[kVectors], last = set1(best.logits[kTop - 1]);
  uint32_t better[kVectors], any = 0;
  for (int v = 0; v < kVectors; ++v) {
    values[v] = load_as_float(block + 16 * v);
    better[v] = less_mask(last, values[v]);
    any |= better[v];
  }
  if (__builtin_expect(any != 0, 0)) {
    best.look_into(block, first, better);
    if (best.logits[0] > sums.shift) sums.move_to(best.logits[0]);
  }
  F16 shift = set1(sums.shift), weights[kVectors], weighted = set1(0.0f);
  for (int v = 0; v < kVectors; ++v) {
    F16 below = max(set1(kLowest), sub(values[v], shift));  // NaN stays
    weights[v] = exp2(mul(below, set1(kLog2E)));
    weighted = fma(below, weights[v], weighted);
  }
  sums.weights = add(sums.weights, add(add(weights[0], weights[1]), add(weights[2], weights[3])));
  sums.weighted = add(sums.weighted, weighted);
}

PYSPEC_INLINE float sum_lanes(F16 a) {
  float lanes[16];
  store(lanes, a);
  for (int step = 8; step; step /= 2) {
    for (int i = 0; i < step; ++i) lanes[i] += lanes[i + step];
  }
  return lanes[0];
}

template <class Storage>
bool has_nan(const Storage* logits, int64_t vocab) {
  for (int64_t i = 0; i < vocab; ++i) {
    if (to_float(logits[i]) != to_float(logits[i])) return true;
  }
  return false;
}

template <class Storage>
void fold_row(const RowStatisticsParams& p, int64_t row) {
  const Storage* logits = static_cast<const Storage*>(p.logits) + row * p.stride;
  Best best;
  Sums sums;
  int64_t first = 0;
  for (; first + kBlock <= p.vocab; first += kBlock) fold_block(logits + first, first, best, sums);
  if (first < p.vocab) {
    Storage block[kBlock];
    for (int64_t i = 0; i < kBlock; ++i) from_float(-kInfinity, block + i);
    std::memcpy(block, logits + first, (p.vocab - first) * sizeof(Storage));
    fold_block(block, first, best, sums);
  }

  float nan = __builtin_nanf(""), total = sum_lanes(sums.weights), log_total = __builtin_logf(total);
  float log_sum_exp = best.logits[0] + log_total;
  // Where that is not finite, total is NaN or 0 and entropy and probabilities become NaN. Against +inf it is
  // always NaN, so it does not tell whether the row has NaN.
  if (best.logits[0] == kInfinity) log_sum_exp = has_nan(logits, p.vocab) ? nan : kInfinity;
  p.log_sum_exp[row] = log_sum_exp;
  p.entropy[row] = log_total - sum_lanes(sums.weighted) / total;
  std::memcpy(p.top_tokens + row * kTop, best.tokens, sizeof best.tokens);
  std::memcpy(p.top_logits + row * kTop, best.logits, sizeof best.logits);
  for (int64_t i = row * p.count; i < (row + 1) * p.count; ++i) {
    int64_t token = p.tokens[i];
    bool is_known = token >= 0 && token < p.vocab;
    p.token_probabilities[i] = is_known ? __builtin_expf(to_float(logits[token]) - sums.shift) / total : nan;
  }
}

template <class Storage>
void row_statistics(const RowStatisticsParams& p) {
  int64_t rows_per_item = p.vocab < kLogitsPerItem ? kLogitsPerItem / p.vocab : 1;
  auto item = [&](int64_t index) {
    int64_t end = (index + 1) * rows_per_item;
    for (int64_t row = index * rows_per_item; row < p.rows && row < end; ++row) fold_row<Storage>(p, row);
  };
  pyspec::parallel(p.parallel_for, (p.rows + rows_per_item - 1) / rows_per_item, item);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_row_statistics)(const RowStatisticsParams& p) {
  with_element(p.element, [&](auto element) { row_statistics<decltype(element)>(p); });
}
