// The tensors of gated_delta as params, but for the round and the result: shapes and dtypes are checked, on
// any device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "element.h"
#include "params/gated_delta.h"

namespace pyspec {

namespace delta {

using torch::stable::Tensor;

// A row stride in elements, of [rows, size].
inline int64_t row_stride(const Tensor& tensor, int64_t rows, int64_t size,
                          torch::headeronly::ScalarType dtype, const char* name) {
  STD_TORCH_CHECK(tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == size &&
                      tensor.stride(1) == 1 && tensor.scalar_type() == dtype,
                  name, " must be [", rows, ", ", size, "] of ", torch::headeronly::toString(dtype),
                  " with a contiguous last dimension");
  return tensor.stride(0);
}

inline GatedDeltaParams params_of(Tensor state, Tensor record, const Tensor& q, const Tensor& k,
                                  const Tensor& v, const Tensor& decay, const Tensor& beta, const Tensor& a,
                                  const std::optional<Tensor>& dt_bias, double strength, bool tiled) {
  auto float32 = torch::headeronly::ScalarType::Float;
  auto dtype = v.scalar_type();
  GatedDeltaParams p{};
  STD_TORCH_CHECK(state.dim() == 4 && state.size(3) == kDeltaLanes && state.size(2) > 0 &&
                      state.size(2) % kKeyMultiple == 0 && state.scalar_type() == float32 &&
                      state.is_contiguous(),
                  "state must be float32 [sequences, channels / 16, N, 16] and contiguous, N a multiple of ",
                  kKeyMultiple);
  p.sequences = state.size(0), p.channels = state.size(1) * kDeltaLanes, p.keys = state.size(2);
  STD_TORCH_CHECK(q.dim() == 2 && v.dim() == 2 && decay.dim() == 2, "q, v and decay must be [rows, ...]");
  STD_TORCH_CHECK(a.dim() == 1 && a.scalar_type() == float32 && a.is_contiguous(),
                  "A must be float32 [heads] and contiguous");
  int64_t rows = v.size(0);
  p.heads = a.size(0), p.key_heads = q.size(1) / p.keys, p.decays = decay.size(1);
  STD_TORCH_CHECK(p.heads > 0 && p.channels % (p.heads * kDeltaLanes) == 0,
                  "A must have heads of a multiple of ", kDeltaLanes, " channels, got ", p.heads, " for ",
                  p.channels);
  STD_TORCH_CHECK(p.key_heads > 0 && p.heads % p.key_heads == 0, "q must have key heads that divide the ",
                  p.heads, " heads, got ", p.key_heads);
  STD_TORCH_CHECK(p.decays == p.heads || p.decays == p.heads * p.keys, "decay must be [rows, ", p.heads,
                  "] or [rows, ", p.heads * p.keys, "], got ", p.decays);
  p.q_stride = row_stride(q, rows, p.key_heads * p.keys, dtype, "q");
  p.k_stride = row_stride(k, rows, p.key_heads * p.keys, dtype, "k");
  p.v_stride = row_stride(v, rows, p.channels, dtype, "v");
  p.decay_stride = row_stride(decay, rows, p.decays, float32, "decay");
  p.beta_stride = row_stride(beta, rows, p.heads, float32, "beta");
  if (dt_bias) {
    STD_TORCH_CHECK(dt_bias->dim() == 1 && dt_bias->size(0) == p.decays &&
                        dt_bias->scalar_type() == float32 && dt_bias->is_contiguous(),
                    "dt_bias must be float32 [", p.decays, "] and contiguous");
    p.dt_bias = static_cast<const float*>(dt_bias->data_ptr());
  }
  STD_TORCH_CHECK(
      record.dim() == 4 && record.size(0) == 2 && record.size(1) == p.sequences &&
          record.size(3) == record_width(p) && record.scalar_type() == float32 && record.is_contiguous(),
      "record must be float32 [2, ", p.sequences, ", nodes, ", record_width(p), "] and contiguous");
  p.record_nodes = record.size(2), p.strength = static_cast<float>(strength), p.tiled = tiled;
  p.state = static_cast<float*>(state.data_ptr()), p.record = static_cast<float*>(record.data_ptr());
  p.q = q.data_ptr(), p.k = k.data_ptr(), p.v = v.data_ptr(), p.element = element_of(v, "v");
  p.decay = static_cast<const float*>(decay.data_ptr());
  p.beta = static_cast<const float*>(beta.data_ptr()), p.a = static_cast<const float*>(a.data_ptr());
  return p;
}

}  // namespace delta
}  // namespace pyspec
