// What programs of kernels share: pieces of one buffer, and the params of a linear inside.
#pragma once

#include "boundary.h"
#include "params/linear.h"

namespace pyspec {

// Hands out pieces of one buffer; with a null base it only counts.
class Buffer {
 public:
  explicit Buffer(float* base) : base_(base) {}
  template <class T = float>
  T* take(int64_t bytes) {
    T* piece = reinterpret_cast<T*>(base_ + floats_);
    floats_ += (bytes + 63) / 64 * 16;
    return base_ ? piece : nullptr;
  }
  int64_t floats() const { return floats_; }

 private:
  float* base_;
  int64_t floats_ = 0;
};

inline const float* floats_of(const torch::stable::Tensor& tensor, int64_t size, const char* name) {
  STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Float && tensor.numel() == size &&
                      tensor.is_contiguous(),
                  name, " must be float32 [", size, "] and contiguous");
  return static_cast<const float*>(tensor.data_ptr());
}

inline LinearParams linear_of(const torch::stable::Tensor& weight, const void* x, Element element, float* out,
                              int64_t rows, int64_t inputs, int64_t outputs) {
  LinearParams p{};
  p.rows = rows, p.inputs = inputs, p.outputs = outputs;
  set_weight(p, weight);
  p.x = x, p.x_element = element, p.x_stride = inputs;
  p.out = out, p.out_element = Element::kFloat32, p.out_stride = outputs;
  p.parallel_for = team_parallel_for;
  return p;
}

}  // namespace pyspec
