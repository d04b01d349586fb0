// What the ops over quantised keys and values check alike and write into their params (gear, residual_vq), on
// any device.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <tuple>

#include "element.h"

namespace pyspec {

// Attention: the sizes that its format is checked against.
template <class Params>
Params quantised_attention_params(const torch::stable::Tensor& q, const torch::stable::Tensor& quantised) {
  STD_TORCH_CHECK(q.dim() == 4 && quantised.dim() == 4, "q and quantised must have 4 dimensions");
  STD_TORCH_CHECK(q.stride(3) == 1, "q must have a contiguous last dimension");
  Params p{};
  p.element = element_of(q, "q");
  p.batch = q.size(0), p.heads = q.size(1), p.nodes = q.size(2), p.head_dim = q.size(3);
  p.kv_heads = quantised.size(1);
  STD_TORCH_CHECK(p.kv_heads > 0 && p.heads % p.kv_heads == 0,
                  "quantised must have a number of heads that divides q's");
  return p;
}

// Everything but the format, the results, `seen` and the workspace.
template <class Params>
void set_quantised(Params& p, const torch::stable::Tensor& q, const torch::stable::Tensor& quantised,
                   const torch::stable::Tensor& seen, int64_t record_bytes, double scale) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(quantised.scalar_type() == ScalarType::Byte && quantised.size(0) == p.batch &&
                      quantised.size(3) == record_bytes && quantised.stride(3) == 1,
                  "quantised must be uint8 [batch, kv_heads, blocks, ", record_bytes,
                  "] with a contiguous last dimension");
  STD_TORCH_CHECK(seen.scalar_type() == ScalarType::Int && seen.dim() == 2 && seen.size(0) == p.batch &&
                      seen.size(1) == p.nodes,
                  "seen must be int32 [batch, nodes]");
  STD_TORCH_CHECK(scale > 0, "scale must be positive, got ", scale);
  p.q = q.data_ptr(), p.quantised = static_cast<const uint8_t*>(quantised.data_ptr());
  copy_strides(q, p.q_strides), copy_strides(quantised, p.quantised_strides);
  p.scale = static_cast<float>(scale);
}

// New tensors for the results: out like q, lse [batch, heads, nodes].
template <class Params>
std::tuple<torch::stable::Tensor, torch::stable::Tensor> set_results(Params& p,
                                                                     const torch::stable::Tensor& q) {
  auto out = torch::stable::empty_like(q);
  auto lse = torch::stable::new_empty(q, {p.batch, p.heads, p.nodes}, torch::headeronly::ScalarType::Float);
  p.out = out.data_ptr(), p.lse = static_cast<float*>(lse.data_ptr());
  copy_strides(out, p.out_strides);
  return {out, lse};
}

// Quantiser: keys and values, of blocks of `block` tokens. Keys may have fewer channels than values.
template <class Params>
Params quantised_encode_params(const torch::stable::Tensor& k, const torch::stable::Tensor& v,
                               int64_t block) {
  STD_TORCH_CHECK(k.dim() == 4 && v.dim() == 4, "k and v must have 4 dimensions");
  Params p{};
  p.element = element_of(k, "k");
  STD_TORCH_CHECK(v.scalar_type() == k.scalar_type(), "v must have the dtype of k");
  for (int i = 0; i < 3; ++i) STD_TORCH_CHECK(v.size(i) == k.size(i), "v must have the shape of k");
  STD_TORCH_CHECK(k.stride(3) == 1 && v.stride(3) == 1, "k and v must have a contiguous last dimension");
  STD_TORCH_CHECK(k.size(2) % block == 0, "k must have a multiple of ", block, " tokens, got ", k.size(2));
  p.batch = k.size(0), p.kv_heads = k.size(1), p.blocks = k.size(2) / block, p.head_dim = v.size(3);
  p.k = k.data_ptr(), p.v = v.data_ptr();
  copy_strides(k, p.k_strides), copy_strides(v, p.v_strides);
  return p;
}

}  // namespace pyspec
