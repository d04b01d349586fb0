// The tensors of selective_state as params, but for the round and the result: shapes and dtypes are checked,
// on any device.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "element.h"
#include "params/selective_state.h"

namespace pyspec {

namespace selective {

using torch::stable::Tensor;

inline const float* floats_of(const std::optional<Tensor>& tensor, int64_t size, const char* name) {
  if (!tensor) return nullptr;
  STD_TORCH_CHECK(tensor->dim() == 1 && tensor->size(0) == size &&
                      tensor->scalar_type() == torch::headeronly::ScalarType::Float &&
                      tensor->is_contiguous(),
                  name, " must be float32 [", size, "] and contiguous");
  return static_cast<const float*>(tensor->data_ptr());
}

// A row stride in elements, of [rows, size].
inline int64_t row_stride(const Tensor& tensor, int64_t rows, int64_t size, const char* name) {
  STD_TORCH_CHECK(
      tensor.dim() == 2 && tensor.size(0) == rows && tensor.size(1) == size && tensor.stride(1) == 1, name,
      " must be [", rows, ", ", size, "] with a contiguous last dimension");
  return tensor.stride(0);
}

inline SelectiveStateParams params_of(Tensor state, Tensor record, const Tensor& x, const Tensor& dt,
                                      const Tensor& a, const Tensor& b, const Tensor& c,
                                      const std::optional<Tensor>& d, const std::optional<Tensor>& dt_bias,
                                      const std::optional<Tensor>& z) {
  auto float32 = torch::headeronly::ScalarType::Float;
  SelectiveStateParams p{};
  STD_TORCH_CHECK(state.dim() == 4 && state.size(3) == kStateLanes && state.size(2) % kStateMultiple == 0 &&
                      state.scalar_type() == float32 && state.is_contiguous(),
                  "state must be float32 [sequences, channels / 16, state_size, 16] and contiguous, "
                  "state_size a multiple of ",
                  kStateMultiple);
  p.sequences = state.size(0), p.channels = state.size(1) * kStateLanes, p.state_size = state.size(2);
  STD_TORCH_CHECK(x.dim() == 2 && dt.dim() == 2 && b.dim() == 2, "x, dt and B must be [rows, ...]");
  int64_t rows = x.size(0);
  p.heads = dt.size(1), p.groups = b.size(1) / p.state_size;
  STD_TORCH_CHECK(p.heads > 0 && p.groups > 0 && p.heads % p.groups == 0, "dt must have a multiple of the ",
                  p.groups, " groups of B as heads, got ", p.heads);
  p.x_stride = row_stride(x, rows, p.channels, "x"), p.dt_stride = row_stride(dt, rows, p.heads, "dt");
  p.b_stride = row_stride(b, rows, p.groups * p.state_size, "B");
  p.c_stride = row_stride(c, rows, p.groups * p.state_size, "C");
  STD_TORCH_CHECK(b.scalar_type() == x.scalar_type() && c.scalar_type() == x.scalar_type(),
                  "B and C must have the dtype of x");
  STD_TORCH_CHECK(dt.scalar_type() == float32 && a.scalar_type() == float32 && a.is_contiguous(),
                  "dt and A must be float32, A contiguous");
  p.x_element = element_of(x, "x");
  p.a_per_state = a.dim() == 3;
  if (p.a_per_state) {
    STD_TORCH_CHECK(
        a.size(0) == state.size(1) && a.size(1) == p.state_size && a.size(2) == kStateLanes &&
            p.heads == p.channels && p.groups == 1,
        "A in panels must have the shape of a sequence's state, one dt a channel and one group of B");
  } else {
    STD_TORCH_CHECK(a.dim() == 1 && a.size(0) == p.heads && p.channels % (p.heads * kStateLanes) == 0,
                    "A must be [heads] with a multiple of ", kStateLanes, " channels a head");
  }
  p.d = floats_of(d, p.channels, "D"), p.dt_bias = floats_of(dt_bias, p.heads, "dt_bias");
  if (z) {
    STD_TORCH_CHECK(z->scalar_type() == float32, "z must be float32");
    p.z_stride = row_stride(*z, rows, p.channels, "z"), p.z = static_cast<const float*>(z->data_ptr());
  }
  STD_TORCH_CHECK(
      record.dim() == 4 && record.size(0) == 2 && record.size(1) == p.sequences &&
          record.size(3) == record_width(p) && record.scalar_type() == float32 && record.is_contiguous(),
      "record must be float32 [2, ", p.sequences, ", nodes, ", record_width(p), "] and contiguous");
  p.record_nodes = record.size(2);
  p.state = static_cast<float*>(state.data_ptr()), p.record = static_cast<float*>(record.data_ptr());
  p.x = x.data_ptr(), p.b = b.data_ptr(), p.c = c.data_ptr();
  p.dt = static_cast<const float*>(dt.data_ptr()), p.a = static_cast<const float*>(a.data_ptr());
  return p;
}

}  // namespace selective
}  // namespace pyspec
