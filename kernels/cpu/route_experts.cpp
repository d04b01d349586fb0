// route_experts and mix_experts on the CPU: a row's best experts, and the sum of what they gave.
//
// A row's logits become scores 16 at a time, in a buffer on the stack; its experts are then found one after
// another, each by a pass over the buffer, so that equal scores go to the lower number. All of it is a few
// microseconds a row, bound by the passes. A mix adds its choices in the order of their ranking, one chain of
// multiply-adds for each output, bound by reading the values. Both look at one row: the row rule holds.
#include "params/route_experts.h"

#include "cpu/simd.h"

namespace {

using pyspec::kMostExperts;
using pyspec::MixExpertsParams;
using pyspec::RouteExpertsParams;

constexpr int64_t kPiece = 512;

float sum_of(const float* values, int64_t count) {
  float sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += values[i];
  return sum;
}

void route(const RouteExpertsParams& p, int64_t row) {
  alignas(64) float scores[kMostExperts] = {};
  float keys[kMostExperts];
  bool is_taken[kMostExperts] = {};
  std::memcpy(scores, p.logits + row * p.experts, p.experts * sizeof(float));
  std::memcpy(keys, scores, p.experts * sizeof(float));
  float largest = scores[0];
  for (int64_t e = 1; e < p.experts; ++e) largest = scores[e] > largest ? scores[e] : largest;
  for (int64_t e = 0; e < p.experts; e += 16) {
    F16 logit = load(scores + e);
    F16 score = p.is_sigmoid ? sigmoid_product(set1(1.0f), logit)
                             : exp2(mul(sub(logit, set1(largest)), set1(kLog2E)));
    store(scores + e, score);
  }
  float total = p.is_sigmoid ? 1.0f : sum_of(scores, p.experts);
  if (p.bias) {
    for (int64_t e = 0; e < p.experts; ++e) keys[e] = scores[e] / total + p.bias[e];
  }
  float* gates = p.gates + row * p.choices;
  int32_t* ids = p.ids + row * p.choices;
  for (int64_t choice = 0; choice < p.choices; ++choice) {
    int64_t best = -1;  // so that NaN cannot leave a choice open
    for (int64_t e = 0; e < p.experts; ++e) {
      if (!is_taken[e] && (best < 0 || keys[e] > keys[best])) best = e;
    }
    is_taken[best] = true;
    ids[choice] = static_cast<int32_t>(best), gates[choice] = scores[best];
  }
  if (p.renormalises) total = sum_of(gates, p.choices);
  for (int64_t choice = 0; choice < p.choices; ++choice) {
    gates[choice] = gates[choice] / total * (p.scales ? p.scales[ids[choice]] * p.scale : p.scale);
  }
}

void mix(const MixExpertsParams& p, int64_t row, int64_t first) {
  const float* gates = p.gates + row * p.choices;
  const float shared_gate = p.shared_gates ? p.shared_gates[row] : 1.0f;
  const float* values = p.values + row * p.choices * p.size;
  const float* shared = p.shared ? p.shared + row * p.size : nullptr;
  float* out = p.out + row * p.size;
  // load_at(pointer) gives the outputs from i on
  auto mixed = [&](int64_t i, auto load_at) {
    F16 sum = set1(0.0f);
    for (int64_t choice = 0; choice < p.choices; ++choice) {
      sum = fma(set1(gates[choice]), load_at(values + choice * p.size + i), sum);
    }
    return shared ? fma(set1(shared_gate), load_at(shared + i), sum) : sum;
  };
  int64_t end = first + kPiece < p.size ? first + kPiece : p.size, i = first;
  for (; i + 16 <= end; i += 16) store(out + i, mixed(i, [](const float* at) { return load(at); }));
  for (; i < end; ++i) {
    float lanes[16];
    store(lanes, mixed(i, [](const float* at) { return set1(*at); }));
    out[i] = lanes[0];
  }
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_route_experts)(const RouteExpertsParams& p) {
  auto row = [&](int64_t index) { route(p, index); };
  pyspec::parallel(p.parallel_for, p.rows, row);
}

extern "C" void PYSPEC_ENTRY(pyspec_mix_experts)(const MixExpertsParams& p) {
  int64_t pieces = (p.size + kPiece - 1) / kPiece;
  auto item = [&](int64_t index) { mix(p, index / pieces, index % pieces * kPiece); };
  pyspec::parallel(p.parallel_for, p.rows * pieces, item);
}
