#include "params/topk.h"

#include "boundary.h"

namespace {

using torch::stable::Tensor;

PYSPEC_KERNEL_TABLE(pyspec_topk, pyspec::TopkParams);

std::tuple<Tensor, Tensor> topk(const Tensor& x, int64_t k, int64_t buckets, int64_t per_bucket,
                                bool interleaved, bool largest, bool sorted) {
  STD_TORCH_CHECK(x.dim() == 2 && (x.size(1) <= 1 || x.stride(1) == 1) && x.size(1) < int64_t{1} << 31,
                  "x must be [rows, n] with a contiguous last dimension and n < 2^31");
  STD_TORCH_CHECK(k >= 1 && k <= x.size(1), "k must be in [1, n]");
  STD_TORCH_CHECK(buckets >= 0 && buckets < int64_t{1} << 31 && per_bucket >= 1 &&
                      per_bucket <= pyspec::kMostPerBucket && (buckets == 0 || buckets * per_bucket >= k),
                  "buckets and per_bucket must keep at least k values, per_bucket at most ",
                  pyspec::kMostPerBucket);
  pyspec::TopkParams p{};
  p.element = pyspec::element_of(x, "x");
  p.rows = x.size(0), p.n = x.size(1), p.k = k, p.stride = x.stride(0);
  p.buckets = buckets, p.per_bucket = per_bucket;
  p.interleaved = interleaved, p.largest = largest, p.sorted = sorted;
  p.x = x.data_ptr();
  Tensor values = pyspec::empty(p.rows, k, x.scalar_type());
  Tensor indices = pyspec::empty(p.rows, k, torch::headeronly::ScalarType::Long);
  p.values = values.data_ptr();
  p.indices = static_cast<int64_t*>(indices.data_ptr());
  p.segments = pyspec::topk_segments(p, torch::stable::get_num_threads());
  if (p.segments == 1) {
    p.parallel_for = pyspec::parallel_for;
    pyspec_topk_table[pyspec::instruction_set()](p);
    return {values, indices};
  }
  p.workspace = pyspec::workspace((pyspec::topk_workspace_bytes(p) + 3) / 4);
  p.parallel_for = pyspec::team_parallel_for;
  struct Program {
    void (*kernel)(const pyspec::TopkParams&);
    const pyspec::TopkParams& p;
  } program = {pyspec_topk_table[pyspec::instruction_set()], p};
  auto run = [](void* context) {
    const Program& program = *static_cast<Program*>(context);
    program.kernel(program.p);
  };
  pyspec::run_team(2, run, &program);
  return {values, indices};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(pyspec, CPU, m) { m.impl("topk", TORCH_BOX(&topk)); }
