// take_columns on the CPU: out[r, j] = x[r, order[j]], bits as they are. A row lies in the first or second
// cache, so this is bound by loads, one for each column; an item is a piece of a row, so that a single row
// keeps all threads busy.
#include "params/take_columns.h"

namespace {

constexpr int64_t kPiece = 1024;

template <class Bits>
void piece(const pyspec::TakeColumnsParams& p, int64_t row, int64_t first) {
  const Bits* x = static_cast<const Bits*>(p.x) + row * p.x_stride;
  Bits* out = static_cast<Bits*>(p.out) + row * p.columns;
  int64_t end = first + kPiece < p.columns ? first + kPiece : p.columns;
  for (int64_t j = first; j < end; ++j) out[j] = x[p.order[j]];
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_take_columns)(const pyspec::TakeColumnsParams& p) {
  int64_t pieces = (p.columns + kPiece - 1) / kPiece;
  auto item = [&](int64_t index) {
    int64_t row = index / pieces, first = index % pieces * kPiece;
    if (p.element == pyspec::Element::kFloat32) {
      piece<uint32_t>(p, row, first);
    } else {
      piece<uint16_t>(p, row, first);
    }
  };
  pyspec::parallel(p.parallel_for, p.rows * pieces, item);
}
