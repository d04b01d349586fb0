// What reading and writing codes share: codes of more than 8 bits, and codebooks with codes as lanes.
#pragma once

#include "cpu/simd.h"
#include "params/residual_vq.h"

namespace {

// The 11 bits of each of a block's codes in one group and level.
PYSPEC_INLINE void unpack_codes(const uint8_t* quantised, uint16_t* codes) {
  const uint8_t* planes = quantised + pyspec::kVqBlock;
  for (int64_t token = 0; token < pyspec::kVqBlock; ++token) {
    unsigned high = 0;
    for (int plane = 0; plane < 3; ++plane)
      high |= (planes[plane * pyspec::kVqPlane + token / 8] >> (token % 8) & 1u) << plane;
    codes[token] = static_cast<uint16_t>(quantised[token] | high << 8);
  }
}

// The reverse; bits are 8 or 11.
PYSPEC_INLINE void pack_codes(const uint16_t* codes, int64_t planes, uint8_t* quantised) {
  for (int64_t token = 0; token < pyspec::kVqBlock; ++token)
    quantised[token] = static_cast<uint8_t>(codes[token]);
  for (int64_t plane = 0; plane < planes; ++plane) {
    uint8_t* to = quantised + pyspec::kVqBlock + plane * pyspec::kVqPlane;
    for (int64_t i = 0; i < pyspec::kVqPlane; ++i) {
      unsigned byte = 0;
      for (int t = 0; t < 8; ++t) byte |= (codes[8 * i + t] >> (8 + plane) & 1u) << t;
      to[i] = static_cast<uint8_t>(byte);
    }
  }
}

// fp16 [codes][32] to fp32 [32][codes].
PYSPEC_INLINE void transpose_codewords(const uint16_t* words, int64_t codes, float* to) {
  const Float16* from = reinterpret_cast<const Float16*>(words);
  for (int64_t code = 0; code < codes; code += 16) {
    for (int64_t half = 0; half < pyspec::kVqWidth; half += 16) {
      F16 rows[16];
      for (int i = 0; i < 16; ++i) rows[i] = load_as_float(from + (code + i) * pyspec::kVqWidth + half);
      transpose(rows);
      for (int i = 0; i < 16; ++i) store(to + (half + i) * codes + code, rows[i]);
    }
  }
}

}  // namespace
