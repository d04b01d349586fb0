#include "../selective_state.h"

#include "rounds.h"

extern "C" int pyspec_selective_state_cuda(const pyspec::SelectiveStateParams& p, int64_t rows,
                                           cudaStream_t stream);

namespace {

using torch::stable::Tensor;

constexpr int64_t kMostStates = 256;

Tensor selective_state(Tensor state, Tensor record, const Tensor& x, const Tensor& dt, const Tensor& a,
                       const Tensor& b, const Tensor& c, const std::optional<Tensor>& d,
                       const std::optional<Tensor>& dt_bias, const std::optional<Tensor>& z,
                       const Tensor& sequences, const Tensor& starts, const Tensor& parents,
                       const Tensor& paths, const Tensor& halves, const Tensor& advances,
                       torch::headeronly::ScalarType out_dtype) {
  auto p = pyspec::selective::params_of(state, record, x, dt, a, b, c, d, dt_bias, z);
  int64_t rows = x.size(0);
  STD_TORCH_CHECK(p.state_size <= (p.state_size % 32 ? kMostStates / 2 : kMostStates),
                  "state must have at most ", kMostStates, " states, or ", kMostStates / 2,
                  " if they are no multiple of 32, got ", p.state_size);
  p.round = pyspec::round_of({sequences, starts, parents, paths, halves, advances}, rows);
  Tensor out = pyspec::empty(x, rows, p.channels, out_dtype);
  p.out = out.data_ptr(), p.out_element = pyspec::element_of(out, "out");
  pyspec::Gpu gpu = pyspec::gpu_of(x);
  pyspec::check(static_cast<cudaError_t>(pyspec_selective_state_cuda(p, rows, gpu.stream)),
                "selective_state");
  return out;
}

}  // namespace

PYSPEC_CUDA_LIBRARY(m) { m.impl("selective_state", TORCH_BOX(&selective_state)); }
