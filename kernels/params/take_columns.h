// take_columns: columns of x in another order.
#pragma once

#include "params/common.h"

namespace pyspec {

struct TakeColumnsParams {
  const void* x;         // [rows, columns], the last dimension contiguous
  const int32_t* order;  // [columns], contiguous, each in [0, columns)
  void* out;             // [rows, columns], contiguous
  int64_t rows, columns;
  int64_t x_stride;  // elements from row to row
  Element element;   // of x and out
  ParallelFor parallel_for;
};

}  // namespace pyspec
