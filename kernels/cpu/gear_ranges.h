// The range of a group of values, zero and scale: from the smallest to the largest, or where its codes leave
// the least squared error. Sums are fp32, in an order that the size alone decides.
#pragma once

#include "cpu/simd.h"
#include "params/gear.h"

namespace {

constexpr int64_t kMostLength = 256;              // of a vector
constexpr float kWidths[] = {1.0f, 0.85f, 0.7f};  // of min-max that a fitted range is tried at
constexpr int kSteps = 2;             // of Lloyd for each: codes for a range, the best range for the codes
constexpr float kLargest = 65504.0f;  // fp16

// x in fp16, rounded to the side.
Float16 half_towards(float x, bool upwards) {
  Float16 half;
  from_float(x, &half);
  float back = to_float(half);
  if (upwards ? back >= x : back <= x) return half;
  if ((half.bits & 0x7fff) == 0) return {static_cast<uint16_t>(upwards ? 0x0001 : 0x8001)};
  bool is_negative = half.bits >> 15;
  half.bits = static_cast<uint16_t>(half.bits + (is_negative != upwards ? 1 : -1));
  return half;
}

struct Range {
  Float16 zero, scale;
};

// One group of a vector: size values, a multiple of 16, and which of them have a code.
struct Group {
  const float *values, *kept;
  int64_t size;
  float levels;  // the largest code
};

Range min_max(const Group& g) {
  float lowest = kInfinity, highest = -kInfinity;
  for (int64_t i = 0; i < g.size; ++i) {
    if (g.kept[i] == 0.0f) continue;
    lowest = g.values[i] < lowest ? g.values[i] : lowest;
    highest = g.values[i] > highest ? g.values[i] : highest;
  }
  Float16 zero = half_towards(lowest + 0.0f, false);
  float step = (highest - to_float(zero)) / g.levels;
  return {zero, half_towards(step > pyspec::kSmallestScale ? step : pyspec::kSmallestScale, true)};
}

void find_codes(const Group& g, Range range, float* codes) {
  F16 zero = set1(to_float(range.zero)), scale = set1(to_float(range.scale)), magic = set1(0x1.8p23f);
  for (int64_t i = 0; i < g.size; i += 16) {
    F16 code = div(sub(load(g.values + i), zero), scale);
    code = min(max(code, set1(0.0f)), set1(g.levels));
    store(codes + i, sub(add(code, magic), magic));  // to the nearest integer, ties to even
  }
}

float clamp(float x, float least, float most) { return x < least ? least : x > most ? most : x; }

// The range that fits these codes best.
Range least_squares(const Group& g, const float* codes) {
  F16 counts = set1(0.0f), code_sums = counts, value_sums = counts, spreads = counts, products = counts;
  for (int64_t i = 0; i < g.size; i += 16) {
    F16 kept = load(g.kept + i);
    counts = add(counts, kept);
    code_sums = fma(kept, load(codes + i), code_sums);
    value_sums = fma(kept, load(g.values + i), value_sums);
  }
  float count = sum(counts), code_mean = sum(code_sums) / count, mean = sum(value_sums) / count;
  for (int64_t i = 0; i < g.size; i += 16) {
    F16 off = mul(load(g.kept + i), sub(load(codes + i), set1(code_mean)));
    spreads = fma(off, off, spreads);
    products = fma(off, sub(load(g.values + i), set1(mean)), products);
  }
  float spread = sum(spreads), slope = spread > 0.0f ? sum(products) / spread : 0.0f;
  Range range;
  from_float(clamp(slope, pyspec::kSmallestScale, kLargest), &range.scale);
  from_float(clamp(mean - to_float(range.scale) * code_mean, -kLargest, kLargest), &range.zero);
  return range;
}

float squared_error(const Group& g, const float* codes, Range range) {
  F16 zero = set1(to_float(range.zero)), scale = set1(to_float(range.scale)), total = set1(0.0f);
  for (int64_t i = 0; i < g.size; i += 16) {
    F16 off = sub(load(g.values + i), add(zero, mul(scale, load(codes + i))));
    off = mul(load(g.kept + i), off);
    total = fma(off, off, total);
  }
  return sum(total);
}

Range fitted(const Group& g) {
  Range whole = min_max(g), best = whole;
  float whole_scale = to_float(whole.scale), least = kInfinity;
  alignas(64) float codes[kMostLength];
  for (float width : kWidths) {
    float scale = whole_scale * width;
    Range range;
    from_float(scale > pyspec::kSmallestScale ? scale : pyspec::kSmallestScale, &range.scale);
    from_float(to_float(whole.zero) + 0.5f * g.levels * (whole_scale - to_float(range.scale)), &range.zero);
    find_codes(g, range, codes);
    for (int step = 0; step < kSteps; ++step) {
      range = least_squares(g, codes);
      find_codes(g, range, codes);
    }
    float error = squared_error(g, codes, range);
    if (error < least) least = error, best = range;
  }
  return best;
}

}  // namespace
