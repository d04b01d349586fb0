// Shares of a law in a few levels, so that how often each is right can be learned.
#pragma once

#include <cstdint>

namespace pyspec {

constexpr int kLevels = 10;
constexpr double kPriorByLevel[kLevels] = {0.68, 0.53, 0.45, 0.38, 0.3, 0.22, 0.16, 0.13, 0.1, 0.09};
constexpr double kShareOfLevel[kLevels] = {0.98, 0.9, 0.78, 0.6, 0.42, 0.28, 0.17, 0.1, 0.05, 0.015};

// 0 is surest.
inline uint8_t level_of(double share) {
  constexpr double kAbove[kLevels - 1] = {0.95, 0.85, 0.7, 0.5, 0.35, 0.22, 0.13, 0.07, 0.03};
  uint8_t level = 0;
  while (level < kLevels - 1 && !(share > kAbove[level])) ++level;
  return level;
}

}  // namespace pyspec
