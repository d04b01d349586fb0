// swiglu on the CPU: out = gate / (1 + e^-t) * up, in fp32, rounded once, where t is the gate (silu) or
// 2 sqrt(2 / pi) (gate + 0.044715 gate^3) (gelu_tanh, by tanh(t / 2) = 2 / (1 + e^-t) - 1). Clamped, the gate
// is at most 7, t is 1.702 times that, and up is within -7 and 7, and 1 more. For sigmoid 1 is in the place
// of the gate. relu and none have no exponential; gelu is the exact one, by erfc. Bound by exp2; an item is a
// piece of a row, so that a single row keeps all threads busy.
#include "params/swiglu.h"

#include "cpu/simd.h"

namespace {

using pyspec::Activation;
using pyspec::Element;
using pyspec::SwigluParams;

constexpr int64_t kPiece = 512;

// x times the chance that a normal variable is below x: with size |x|, below 0 that is size erfc(size / sqrt
// 2) / 2. erfc is Chebyshev's fit of Numerical Recipes, t e^(series of t - z^2) with t = 1 / (1 + z / 2),
// which is off by 1.2e-7 of itself at most, however small it is.
PYSPEC_INLINE F16 gelu(F16 x) {
  constexpr float kSeries[] = {0.17087277f,  -0.82215223f, 1.48851587f, -1.13520398f, 0.27886807f,
                               -0.18628806f, 0.09678418f,  0.37409196f, 1.00002368f,  -1.26551223f};
  F16 size = max(x, sub(set1(0.0f), x)), z = mul(size, set1(0.70710678f));
  F16 t = div(set1(1.0f), fma(z, set1(0.5f), set1(1.0f))), series = set1(kSeries[0]);
  for (int i = 1; i < 10; ++i) series = fma(series, t, set1(kSeries[i]));
  F16 power = max(set1(-126.0f), mul(sub(series, mul(z, z)), set1(kLog2E)));
  return sub(max(set1(0.0f), x), mul(size, mul(mul(set1(0.5f), t), exp2(power))));
}

// What is NaN stays so: min and max give their second argument then.
template <Activation kActivation>
PYSPEC_INLINE F16 product(F16 gate, F16 up) {
  if (kActivation == Activation::kSilu) return mul(silu(gate), up);
  if (kActivation == Activation::kSigmoid) return sigmoid_product(up, gate);
  if (kActivation == Activation::kRelu) return mul(max(set1(0.0f), gate), up);
  if (kActivation == Activation::kNone) return mul(gate, up);
  if (kActivation == Activation::kClamped) {
    gate = min(set1(7.0f), gate), up = min(set1(7.0f), max(set1(-7.0f), up));
    return mul(sigmoid_product(gate, mul(gate, set1(1.702f))), add(up, set1(1.0f)));
  }
  if (kActivation == Activation::kGelu) return mul(gelu(gate), up);
  F16 cubic = mul(fma(mul(gate, gate), set1(0.044715f), set1(1.0f)), gate);
  return mul(sigmoid_product(gate, mul(cubic, set1(1.59576912f))), up);
}

template <class Up, class Out, Activation kActivation>
void piece(const SwigluParams& p, int64_t row, int64_t first) {
  const float* gate = p.gate + row * p.gate_stride;
  const Up* up = static_cast<const Up*>(p.up) + row * p.up_stride;
  Out* out = static_cast<Out*>(p.out) + row * p.size;
  int64_t end = first + kPiece < p.size ? first + kPiece : p.size, i = first;
  for (; i + 16 <= end; i += 16)
    store_as(out + i, product<kActivation>(load(gate + i), load_as_float(up + i)));
  if (i == end) return;
  float gates[16] = {};
  Up ups[16] = {};
  std::memcpy(gates, gate + i, (end - i) * sizeof(float));
  std::memcpy(ups, up + i, (end - i) * sizeof(Up));
  store(gates, product<kActivation>(load(gates), load_as_float(ups)));
  for (int64_t j = 0; i + j < end; ++j) from_float(gates[j], out + i + j);
}

template <class Up, class Out>
void piece(const SwigluParams& p, int64_t row, int64_t first) {
  if (p.activation == Activation::kSilu) piece<Up, Out, Activation::kSilu>(p, row, first);
  if (p.activation == Activation::kGeluTanh) piece<Up, Out, Activation::kGeluTanh>(p, row, first);
  if (p.activation == Activation::kClamped) piece<Up, Out, Activation::kClamped>(p, row, first);
  if (p.activation == Activation::kSigmoid) piece<Up, Out, Activation::kSigmoid>(p, row, first);
  if (p.activation == Activation::kRelu) piece<Up, Out, Activation::kRelu>(p, row, first);
  if (p.activation == Activation::kNone) piece<Up, Out, Activation::kNone>(p, row, first);
  if (p.activation == Activation::kGelu) piece<Up, Out, Activation::kGelu>(p, row, first);
}

template <class Up>
void piece(const SwigluParams& p, int64_t row, int64_t first) {
  if (p.out_element == Element::kFloat32) piece<Up, float>(p, row, first);
  if (p.out_element == Element::kFloat16) piece<Up, Float16>(p, row, first);
  if (p.out_element == Element::kBFloat16) piece<Up, BFloat16>(p, row, first);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_swiglu)(const SwigluParams& p) {
  int64_t pieces = (p.size + kPiece - 1) / kPiece;
  auto item = [&](int64_t index) {
    int64_t row = index / pieces, first = index % pieces * kPiece;
    if (p.up_element == Element::kFloat32) piece<float>(p, row, first);
    if (p.up_element == Element::kFloat16) piece<Float16>(p, row, first);
    if (p.up_element == Element::kBFloat16) piece<BFloat16>(p, row, first);
  };
  pyspec::parallel(p.parallel_for, p.rows * pieces, item);
}
