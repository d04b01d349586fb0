#include "../gated_delta.h"

#include "rounds.h"

extern "C" int pyspec_gated_delta_cuda(const pyspec::GatedDeltaParams& p, int64_t rows, cudaStream_t stream);

namespace {

using torch::stable::Tensor;

constexpr int64_t kMostKeys = 256;

Tensor gated_delta(Tensor state, Tensor record, const Tensor& q, const Tensor& k, const Tensor& v,
                   const Tensor& decay, const Tensor& beta, const Tensor& a,
                   const std::optional<Tensor>& dt_bias, const Tensor& sequences, const Tensor& starts,
                   const Tensor& parents, const Tensor& paths, const Tensor& halves, const Tensor& advances,
                   double strength, bool tiled, torch::headeronly::ScalarType out_dtype) {
  auto p = pyspec::delta::params_of(state, record, q, k, v, decay, beta, a, dt_bias, strength, tiled);
  int64_t rows = v.size(0);
  STD_TORCH_CHECK(p.keys <= kMostKeys, "state must have at most ", kMostKeys, " keys, got ", p.keys);
  p.round = pyspec::round_of({sequences, starts, parents, paths, halves, advances}, rows);
  Tensor out = pyspec::empty(v, rows, p.channels, out_dtype);
  p.out = out.data_ptr(), p.out_element = pyspec::element_of(out, "out");
  pyspec::Gpu gpu = pyspec::gpu_of(v);
  pyspec::check(static_cast<cudaError_t>(pyspec_gated_delta_cuda(p, rows, gpu.stream)), "gated_delta");
  return out;
}

}  // namespace

PYSPEC_CUDA_LIBRARY(m) { m.impl("gated_delta", TORCH_BOX(&gated_delta)); }
