#include "../causal_conv.h"

#include "rounds.h"

extern "C" int pyspec_causal_conv_cuda(const pyspec::CausalConvParams& p, int64_t rows, cudaStream_t stream);

namespace {

using torch::stable::Tensor;

Tensor causal_conv(Tensor window, Tensor record, const Tensor& x, const Tensor& weight,
                   const std::optional<Tensor>& bias, const Tensor& sequences, const Tensor& starts,
                   const Tensor& parents, const Tensor& paths, const Tensor& halves, const Tensor& advances,
                   torch::headeronly::ScalarType out_dtype, bool is_linear) {
  auto p = pyspec::causal_conv_params_of(window, record, x, weight, bias);
  int64_t rows = x.size(0);
  p.round = pyspec::round_of({sequences, starts, parents, paths, halves, advances}, rows);
  Tensor out = pyspec::empty(x, rows, p.channels, out_dtype);
  p.is_linear = is_linear, p.out = out.data_ptr(), p.out_element = pyspec::element_of(out, "out");
  pyspec::Gpu gpu = pyspec::gpu_of(x);
  pyspec::check(static_cast<cudaError_t>(pyspec_causal_conv_cuda(p, rows, gpu.stream)), "causal_conv");
  return out;
}

}  // namespace

PYSPEC_CUDA_LIBRARY(m) { m.impl("causal_conv", TORCH_BOX(&causal_conv)); }
