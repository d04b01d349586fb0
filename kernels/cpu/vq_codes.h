// What reading and writing codes share: codes of more than 8 bits, and codebooks with codes as lanes.
#pragma once

#include "cpu/simd.h"
#include "params/residual_vq.h"

namespace {

// The 11 bits of each of a block's codes in one group and level.
PYSPEC_INLINE void unpack_codes(const uint8_t* quantised, uint16_t* codes) {
  const uint8_t* planes = quantised + pyspec::kVqBlock;
#if PYSPEC_HAS_AVX512
  for (int64_t token = 0; token < pyspec::kVqBlock; token += 32) {
    __m512i code =
        _mm512_cvtepu8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(quantised + token)));
    for (int plane = 0; plane < 3; ++plane) {
      uint32_t bits;
      std::memcpy(&bits, planes + plane * pyspec::kVqPlane + token / 8, 4);
      code = _mm512_mask_add_epi16(code, bits, code, _mm512_set1_epi16(static_cast<int16_t>(256 << plane)));
    }
    _mm512_storeu_si512(codes + token, code);
  }
#elif PYSPEC_HAS_X86_VECTORS
  const __m256i bit_of_lane =
      _mm256_setr_epi16(1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384, -32768);
  for (int64_t token = 0; token < pyspec::kVqBlock; token += 16) {
    __m256i code = _mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(quantised + token)));
    for (int plane = 0; plane < 3; ++plane) {
      int16_t bits;
      std::memcpy(&bits, planes + plane * pyspec::kVqPlane + token / 8, 2);
      __m256i here = _mm256_and_si256(_mm256_set1_epi16(bits), bit_of_lane);
      __m256i is_set = _mm256_cmpeq_epi16(here, bit_of_lane);
      code = _mm256_or_si256(code,
                             _mm256_and_si256(is_set, _mm256_set1_epi16(static_cast<int16_t>(256 << plane))));
    }
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(codes + token), code);
  }
#else
  for (int64_t token = 0; token < pyspec::kVqBlock; ++token) {
    unsigned high = 0;
    for (int plane = 0; plane < 3; ++plane)
      high |= (planes[plane * pyspec::kVqPlane + token / 8] >> (token % 8) & 1u) << plane;
    codes[token] = static_cast<uint16_t>(quantised[token] | high << 8);
  }
#endif
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
