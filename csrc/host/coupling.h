// What is known of a draw before it is made: its noise.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <numeric>
#include <vector>

namespace pyspec {

// The noise of pyspec/sampling/sampler.py, number by number. A draw there is the argmax of logit /
// temperature
// + gumbel(seed, position, token), so a guess that uses the same noise is right more often, and whatever is
// guessed, the draw stays what it is.
class SamplerNoise {
 public:
  SamplerNoise(uint64_t seed, double temperature) : seed_(seed), temperature_(temperature) {}

  double gumbel(int64_t position, int32_t token) const {
    const double uniform = (static_cast<double>(word(position, token) >> 12) + 0.5) * 0x1p-52;
    return -std::log(-std::log(uniform));
  }

  // weights [n]: shares at temperature 1 become how likely each token is to win the draw at position, as far
  // as the shares can be trusted. They sum to 1.
  void couple(int64_t position, const int32_t* tokens, double* weights, int n) const {
    double best = -INFINITY;
    for (int i = 0; i < n; ++i) {
      weights[i] = std::log(std::max(weights[i], 1e-9)) / temperature_ + gumbel(position, tokens[i]);
      best = std::max(best, weights[i]);
    }
    double total = 0;
    for (int i = 0; i < n; ++i) total += weights[i] = std::exp(weights[i] - best);
    for (int i = 0; i < n; ++i) weights[i] /= total;
  }

 private:
  // Philox4x64-10, as NumPy runs it: word token of the stream with counter (0, 0, position, 0) and key seed.
  uint64_t word(int64_t position, int32_t token) const {
    uint64_t counter[4] = {static_cast<uint64_t>(token) / 4 + 1, 0, static_cast<uint64_t>(position), 0};
    uint64_t key[2] = {seed_, 0};
    for (int round = 0; round < 10; ++round) {
      uint64_t low[2], high[2];
      multiply(0xD2E7470EE14C6C93ull, counter[0], low[0], high[0]);
      multiply(0xCA5A826395121157ull, counter[2], low[1], high[1]);
      counter[0] = high[1] ^ counter[1] ^ key[0];
      counter[1] = low[1];
      counter[2] = high[0] ^ counter[3] ^ key[1];
      counter[3] = low[0];
      key[0] += 0x9E3779B97F4A7C15ull;
      key[1] += 0xBB67AE8584CAA73Bull;
    }
    return counter[token % 4];
  }

  static void multiply(uint64_t a, uint64_t b, uint64_t& low, uint64_t& high) {
    const uint64_t a_low = a & 0xffffffffu, a_high = a >> 32, b_low = b & 0xffffffffu, b_high = b >> 32;
    const uint64_t middle = a_high * b_low + (a_low * b_low >> 32);
    const uint64_t other = a_low * b_high + (middle & 0xffffffffu);
    low = a * b;
    high = a_high * b_high + (middle >> 32) + (other >> 32);
  }

  uint64_t seed_;
  double temperature_;
};

// The draw that decides a token: without noise it is greedy.
struct Draw {
  const SamplerNoise* noise;
  int64_t position;
};

// The order of n tokens by how likely each is to be drawn, the likeliest first and of equal ones the first;
// weights [n] are their shares at temperature 1, and then what was ordered by.
inline std::vector<int> ranked(const Draw& draw, const int32_t* tokens, double* weights, int n) {
  std::vector<int> order(n);
  std::iota(order.begin(), order.end(), 0);
  if (draw.noise) draw.noise->couple(draw.position, tokens, weights, n);
  std::stable_sort(order.begin(), order.end(), [&](int a, int b) { return weights[a] > weights[b]; });
  return order;
}

}  // namespace pyspec
