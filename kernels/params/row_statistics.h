// row_statistics: what acceptance rules and drafters read of a row of logits, without a softmax stored.
#pragma once

#include "params/common.h"

namespace pyspec {

struct RowStatisticsParams {
  const void* logits;          // [rows, vocab], the last dimension contiguous
  const int64_t* tokens;       // [rows, count], contiguous
  int64_t* top_tokens;         // [rows, kTop], best first, -1 where there is none
  float* top_logits;           // [rows, kTop], -inf where there is none
  float* log_sum_exp;          // [rows], natural log
  float* entropy;              // [rows], nats
  float* token_probabilities;  // [rows, count]; NaN for a token outside [0, vocab)

  int64_t rows, vocab, count;
  int64_t stride;  // elements from row to row of logits
  Element element;
  ParallelFor parallel_for;
};

namespace {

constexpr int kTop = 8;  // tokens that are told for each row, and that a drafter keeps as successors

}  // namespace
}  // namespace pyspec
