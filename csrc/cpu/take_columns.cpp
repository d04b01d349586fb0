#include "params/take_columns.h"

#include "tape.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_take_columns, pyspec::TakeColumnsParams);

Tensor take_columns(const Tensor& x, const Tensor& order) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.stride(1) == 1 || x.size(1) == 1),
                  "x must be [rows, columns] with a contiguous last dimension");
  STD_TORCH_CHECK(order.dim() == 1 && order.size(0) == x.size(1) && order.is_contiguous() &&
                      order.scalar_type() == torch::headeronly::ScalarType::Int,
                  "order must be int32 [", x.size(1), "] and contiguous");
  pyspec::TakeColumnsParams p{};
  p.rows = x.size(0), p.columns = x.size(1), p.x_stride = x.stride(0);
  p.x = x.data_ptr(), p.order = static_cast<const int32_t*>(order.data_ptr());
  for (int64_t j = 0; j < p.columns; ++j) {
    STD_TORCH_CHECK(p.order[j] >= 0 && p.order[j] < p.columns, "order[", j, "] is ", p.order[j], ", x has ",
                    p.columns, " columns");
  }
  p.element = pyspec::element_of(x, "x");
  Tensor out = pyspec::new_tensor({p.rows, p.columns}, x.scalar_type());
  p.out = out.data_ptr();
  pyspec::launch(pyspec_take_columns_table, p);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("take_columns", TORCH_BOX(&take_columns)); }
