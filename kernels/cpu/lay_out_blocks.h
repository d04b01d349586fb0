// Blocks of weights in few bits: out of the bytes of a GGUF file, rounded from fp32, and into a lane of a
// panel.
#pragma once

#include <type_traits>

#include "cpu/simd.h"
#include "params/lay_out.h"

namespace {

using pyspec::CodeFormat;

// One output's block, taken apart: value = factor * scale[g] * level of code - floor * minimum[g].
struct alignas(64) Block {
  uint8_t codes[256];
  int8_t scales[16];
  uint8_t minimums[16];
  uint16_t factor, floor;  // fp16, or bf16 for mxfp4
};

template <CodeFormat kFormat>
using FormatOf = std::integral_constant<CodeFormat, kFormat>;

// Calls body with a FormatOf a format that GGUF files have.
template <class Body>
PYSPEC_INLINE void with_file_format(int32_t format, const Body& body) {
  switch (static_cast<CodeFormat>(format)) {
#define PYSPEC_CASE(name) \
  case CodeFormat::name:  \
    return body(FormatOf<CodeFormat::name>{});
    PYSPEC_CASE(kQ4_0)
    PYSPEC_CASE(kQ4_1)
    PYSPEC_CASE(kQ5_0)
    PYSPEC_CASE(kQ5_1)
    PYSPEC_CASE(kQ8_0)
    PYSPEC_CASE(kQ2K)
    PYSPEC_CASE(kQ3K)
    PYSPEC_CASE(kQ4K)
    PYSPEC_CASE(kQ5K)
    PYSPEC_CASE(kQ6K)
    PYSPEC_CASE(kIq4Nl)
    PYSPEC_CASE(kIq4Xs)
    PYSPEC_CASE(kMxfp4)
#undef PYSPEC_CASE
    default:
      return;
  }
}

// ==== out of a file ====

// Fields of bytes: of every kRun bytes first the lowest kBits of all, then the next, and so on; each is put
// `shift` bits up into out.
template <int kBytes, int kRun, int kBits>
PYSPEC_INLINE void add_fields(const uint8_t* data, uint8_t* out, int shift = 0) {
  constexpr int kFields = 8 / kBits;
  for (int run = 0; run < kBytes / kRun; ++run) {
    for (int field = 0; field < kFields; ++field) {
      uint8_t* to = out + (run * kFields + field) * kRun;
      for (int i = 0; i < kRun; ++i) {
        uint8_t bits = static_cast<uint8_t>(data[run * kRun + i] >> (field * kBits) & ((1 << kBits) - 1));
        to[i] = static_cast<uint8_t>(to[i] | bits << shift);
      }
    }
  }
}

// Eight scales and eight minimums of 6 bits, out of 12 bytes.
PYSPEC_INLINE void take_six_bits(const uint8_t* data, Block* block) {
  for (int i = 0; i < 4; ++i) {
    uint8_t low = data[i], high = data[4 + i], rest = data[8 + i];
    block->scales[i] = static_cast<int8_t>(low & 63);
    block->scales[4 + i] = static_cast<int8_t>((rest & 15) | (low >> 2 & 48));
    block->minimums[i] = high & 63;
    block->minimums[4 + i] = static_cast<uint8_t>(rest >> 4 | (high >> 2 & 48));
  }
}

// Scales of which the low 4 bits and the high 2 lie apart, less 32.
template <int kCount, int kLowRun, int kHighRun>
PYSPEC_INLINE void take_scales(const uint8_t* low, const uint8_t* high, Block* block) {
  uint8_t scales[kCount] = {};
  add_fields<kCount / 2, kLowRun, 4>(low, scales);
  add_fields<kCount / 4, kHighRun, 2>(high, scales, 4);
  for (int i = 0; i < kCount; ++i) block->scales[i] = static_cast<int8_t>(scales[i] - 32);
}

PYSPEC_INLINE uint16_t half_at(const uint8_t* data) {
  uint16_t bits;
  std::memcpy(&bits, data, 2);
  return bits;
}

template <CodeFormat kFormat>
PYSPEC_INLINE void take_apart(const uint8_t* data, Block* block) {
  uint8_t* codes = block->codes;
  std::memset(codes, 0, pyspec::shape_of(kFormat).block);
  if constexpr (kFormat == CodeFormat::kQ4_0 || kFormat == CodeFormat::kIq4Nl) {
    block->factor = half_at(data);
    add_fields<16, 16, 4>(data + 2, codes);
  } else if constexpr (kFormat == CodeFormat::kQ4_1) {
    block->factor = half_at(data), block->floor = half_at(data + 2) ^ 0x8000;
    add_fields<16, 16, 4>(data + 4, codes);
  } else if constexpr (kFormat == CodeFormat::kQ5_0) {
    block->factor = half_at(data);
    add_fields<16, 16, 4>(data + 6, codes), add_fields<4, 1, 1>(data + 2, codes, 4);
  } else if constexpr (kFormat == CodeFormat::kQ5_1) {
    block->factor = half_at(data), block->floor = half_at(data + 2) ^ 0x8000;
    add_fields<16, 16, 4>(data + 8, codes), add_fields<4, 1, 1>(data + 4, codes, 4);
  } else if constexpr (kFormat == CodeFormat::kQ8_0) {
    block->factor = half_at(data);
    for (int i = 0; i < 32; ++i) codes[i] = data[2 + i] ^ 128;
  } else if constexpr (kFormat == CodeFormat::kQ2K) {
    block->factor = half_at(data + 80), block->floor = half_at(data + 82);
    for (int i = 0; i < 16; ++i) block->scales[i] = data[i] & 15, block->minimums[i] = data[i] >> 4;
    add_fields<64, 32, 2>(data + 16, codes);
  } else if constexpr (kFormat == CodeFormat::kQ3K) {
    block->factor = half_at(data + 108);
    take_scales<16, 8, 4>(data + 96, data + 104, block);
    add_fields<64, 32, 2>(data + 32, codes), add_fields<32, 32, 1>(data, codes, 2);
  } else if constexpr (kFormat == CodeFormat::kQ4K) {
    block->factor = half_at(data), block->floor = half_at(data + 2);
    take_six_bits(data + 4, block);
    add_fields<128, 32, 4>(data + 16, codes);
  } else if constexpr (kFormat == CodeFormat::kQ5K) {
    block->factor = half_at(data), block->floor = half_at(data + 2);
    take_six_bits(data + 4, block);
    add_fields<128, 32, 4>(data + 48, codes), add_fields<32, 32, 1>(data + 16, codes, 4);
  } else if constexpr (kFormat == CodeFormat::kQ6K) {
    block->factor = half_at(data + 208);
    std::memcpy(block->scales, data + 192, 16);
    add_fields<128, 64, 4>(data, codes), add_fields<64, 32, 2>(data + 128, codes, 4);
  } else if constexpr (kFormat == CodeFormat::kIq4Xs) {
    block->factor = half_at(data);
    take_scales<8, 1, 1>(data + 4, data + 2, block);
    add_fields<128, 16, 4>(data + 8, codes);
  } else {
    static_assert(kFormat == CodeFormat::kMxfp4);
    int exponent = data[0];  // of 2 ** (exponent - 128), of which the first two are subnormal
    block->factor = static_cast<uint16_t>(exponent < 2 ? 32 << exponent : (exponent - 1) << 7);
    add_fields<16, 16, 4>(data + 1, codes);
  }
}

void take_apart(int32_t kind, const uint8_t* data, Block* block) {
  with_file_format(kind, [&](auto format) { take_apart<decltype(format)::value>(data, block); });
}

template <CodeFormat kFormat>
PYSPEC_INLINE bool has_finite_factors(const Block& block) {
  if constexpr (kFormat == CodeFormat::kMxfp4) return true;
  bool is_finite = (block.factor & 0x7c00) != 0x7c00;
  if constexpr (pyspec::shape_of(kFormat).floors == pyspec::Floors::kStored) {
    is_finite &= (block.floor & 0x7c00) != 0x7c00;
  }
  return is_finite;
}

// The values of a block.
void dequantise(int32_t kind, const Block& block, float* values) {
  static constexpr int8_t kIq4[] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
  static constexpr int8_t kFp4[] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};
  const pyspec::CodeShape& shape = pyspec::kCodeShapes[kind];
  const int8_t* table = shape.levels == pyspec::Levels::kIq4   ? kIq4
                        : shape.levels == pyspec::Levels::kFp4 ? kFp4
                                                               : nullptr;
  bool is_mxfp4 = kind == static_cast<int32_t>(CodeFormat::kMxfp4);
  float factor = is_mxfp4 ? to_float(BFloat16{block.factor}) : to_float(Float16{block.factor});
  bool has_floors = shape.floors == pyspec::Floors::kStored;
  float floor_factor = has_floors ? to_float(Float16{block.floor}) : 0.0f;
  for (int g = 0; g < shape.block / shape.group; ++g) {
    float scale = shape.has_scales ? factor * static_cast<float>(block.scales[g]) : factor;
    float floor = shape.has_minimums ? floor_factor * static_cast<float>(block.minimums[g]) : floor_factor;
    for (int i = g * shape.group; i < (g + 1) * shape.group; ++i) {
      int level = table ? table[block.codes[i]] : block.codes[i] + shape.lowest;
      float value = static_cast<float>(level) * scale;
      values[i] = has_floors ? value - floor : value;
    }
  }
}

// ==== rounding ====

constexpr int kRounded = 32;  // values that share a scale

// Values to 8 bits, as int8 weights are.
int32_t round_to_8_bits(const float* values, Block* block) {
  float largest = 0.0f;
  bool is_number = true;
  for (int i = 0; i < kRounded; ++i) {
    float size = __builtin_fabsf(values[i]);
    is_number &= size < kInfinity;
    largest = size > largest ? size : largest;
  }
  if (!is_number) return pyspec::kNotFinite;
  Float16 half;
  from_float(largest / 127.0f, &half);
  float scale = to_float(half), inverse = scale > 0 ? 1.0f / scale : 0.0f;
  for (int i = 0; i < kRounded; ++i) {
    float level = __builtin_rintf(values[i] * inverse);
    level = level < -127.0f ? -127.0f : level > 127.0f ? 127.0f : level;
    block->codes[i] = static_cast<uint8_t>(static_cast<int32_t>(level) + 128);
  }
  block->factor = half.bits;
  return scale < kInfinity ? pyspec::kNone : pyspec::kTooLarge;
}

// Values to 4 bits with a scale, of least squares, and a zero point; see quantise in ops/weight_formats.py.
int32_t round_to_4_bits(const float* values, Block* block) {
  float low = 0.0f, high = 0.0f;
  bool is_number = true;
  for (int i = 0; i < kRounded; ++i) {
    is_number &= __builtin_fabsf(values[i]) < kInfinity;
    low = values[i] < low ? values[i] : low;
    high = values[i] > high ? values[i] : high;
  }
  if (!is_number) return pyspec::kNotFinite;
  float range = high - low, scale = range / 15.0f;
  float zero = scale > 0 ? __builtin_rintf(-low / scale) : 0.0f;
  auto code_of = [&](float value) {
    float code = (scale > 0 ? __builtin_rintf(value / scale) : 0.0f) + zero;
    return code < 0.0f ? 0.0f : code > 15.0f ? 15.0f : code;
  };
  double square = 0, product = 0;
  for (int i = 0; i < kRounded; ++i) {
    double level = code_of(values[i]) - zero;
    square += level * level, product += level * values[i];
  }
  Float16 half;
  from_float(square > 0 ? static_cast<float>(product / square) : 0.0f, &half);
  scale = to_float(half);
  for (int i = 0; i < kRounded; ++i) block->codes[i] = static_cast<uint8_t>(code_of(values[i]));
  block->factor = half.bits, block->minimums[0] = static_cast<uint8_t>(zero);
  return scale < kInfinity && range < kInfinity ? pyspec::kNone : pyspec::kTooLarge;
}

// ==== into a panel ====

// kBits bits above the kBelow lowest of codes, as a plane of a panel's block.
template <int kBits, int kBelow>
PYSPEC_INLINE void write_plane(const uint8_t* codes, int64_t block, int64_t lane, uint8_t* plane) {
  constexpr uint32_t kMask = ((1u << kBits) - 1) * 0x01010101u;
  constexpr int kFours = 8 / kBits;
  for (int64_t word = 0; word < block / 4 / kFours; ++word) {
    uint32_t joined = 0;
    for (int i = 0; i < kFours; ++i) {
      uint32_t four;
      std::memcpy(&four, codes + (word * kFours + i) * 4, 4);
      joined |= (four >> kBelow & kMask) << (i * kBits);
    }
    std::memcpy(plane + (word * pyspec::kPanel + lane) * 4, &joined, 4);
  }
}

// A byte for each group, to its lane: by two where there are several.
PYSPEC_INLINE void write_groups(const uint8_t* bytes, int64_t groups, int64_t lane, uint8_t* place) {
  if (groups == 1) place[lane] = bytes[0];
  for (int64_t g = 0; groups > 1 && g < groups; ++g) {
    place[(g / 2 * pyspec::kPanel + lane) * 2 + g % 2] = bytes[g];
  }
}

template <CodeFormat kFormat>
PYSPEC_INLINE void write_block(const Block& block, uint8_t* place, int64_t lane) {
  constexpr pyspec::CodeShape kShape = pyspec::shape_of(kFormat);
  constexpr int64_t kGroups = kShape.block / kShape.group, kLow = pyspec::low_bits(kShape);
  std::memcpy(place + lane * 2, &block.factor, 2);
  if constexpr (kShape.floors == pyspec::Floors::kStored) {
    std::memcpy(place + (pyspec::kPanel + lane) * 2, &block.floor, 2);
  }
  uint8_t bytes[kGroups];
  if constexpr (kShape.has_scales) {
    for (int64_t g = 0; g < kGroups; ++g) {
      bytes[g] = static_cast<uint8_t>(block.scales[g]);
      if constexpr (kShape.bits == 2) bytes[g] = static_cast<uint8_t>(bytes[g] | block.minimums[g] << 4);
    }
    write_groups(bytes, kGroups, lane, place + pyspec::scales_at(kShape));
  }
  if constexpr (kShape.has_minimums && kShape.bits != 2) {
    write_groups(block.minimums, kGroups, lane, place + pyspec::minimums_at(kShape));
  }
  write_plane<kLow, 0>(block.codes, kShape.block, lane, place + pyspec::codes_at(kShape));
  if constexpr (kShape.bits > kLow) {
    write_plane<kShape.bits - kLow, kLow>(block.codes, kShape.block, lane,
                                          place + pyspec::high_bits_at(kShape));
  }
}

}  // namespace
