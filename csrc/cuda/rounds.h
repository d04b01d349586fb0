// The tensors of a Round. What they hold is on the device, so the kernels look at it themselves.
#pragma once

#include "boundary.h"
#include "params/round.h"

namespace pyspec {

// The tensors that a round points to.
struct RoundTensors {
  const torch::stable::Tensor &sequences, &starts, &parents, &paths, &halves, &advances;
};

inline Round round_of(const RoundTensors& tensors, int64_t rows) {
  auto places = [](const torch::stable::Tensor& tensor, int64_t dims, int64_t size, const char* name) {
    STD_TORCH_CHECK(tensor.scalar_type() == torch::headeronly::ScalarType::Int && tensor.dim() == dims &&
                        tensor.is_contiguous() && tensor.size(0) == size,
                    name, " must be int32, contiguous, of ", dims, " dimensions and ", size, " entries");
    return static_cast<const int32_t*>(tensor.data_ptr());
  };
  Round round{};
  round.trees = tensors.sequences.size(0);
  round.sequences = places(tensors.sequences, 1, round.trees, "sequences");
  round.starts = places(tensors.starts, 1, round.trees + 1, "starts");
  round.parents = places(tensors.parents, 1, rows, "parents");
  round.paths = places(tensors.paths, 2, round.trees, "paths");
  round.halves = places(tensors.halves, 1, round.trees, "halves");
  round.advances = places(tensors.advances, 1, round.trees, "advances");
  round.longest_path = tensors.paths.size(1);
  return round;
}

}  // namespace pyspec
