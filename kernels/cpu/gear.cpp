// Attention to packed keys and values, read where they lie. The codes of 64 tokens at a time become small
// numbers, code - middle, in the first-level cache; scales never touch them:
//
//   score = sum over c of (q[c] scale[c]) number[token][c] + sum over c of q[c] middle[c]
//   out   = sum over tokens of (w[token] scale[token]) number[token][c] + sum over tokens of w[token]
//   middle[token]
//
// Outliers are written over their numbers. Low rank costs `rank` products a row and block: q . b once, then
// one fma for each token; and for values sum of w[token] a[token] once, then one fma for each channel. Tokens
// are the lanes of scores and channels those of values, so that one query row keeps all lanes busy. A row's
// sums have one order whatever rows are beside it: that is the row rule.
//
// Few rows are bound by unpacking (a shift, a table look-up and a store for 16 codes) and by multiply-adds.
#include "params/gear.h"

#include "cpu/hadamard.h"
#include "cpu/simd.h"

namespace {

using pyspec::GearAttentionParams;
using pyspec::GearSide;
using pyspec::kBlock;
using pyspec::kGearRows;
using pyspec::kHalf;
using pyspec::kMostRank;

constexpr int64_t kMostHeadDim = 256, kLeastGroup = 32;
constexpr float kLn2 = 0.693147181f;

#if PYSPEC_HAS_AVX512
constexpr int kPassRows = 4, kPassVectors = 4;  // sums that stay in registers
#else
constexpr int kPassRows = 2, kPassVectors = 2;
#endif

// ==== codes to numbers ====

// What a tile holds for each vector of 32 codes: pairs of bf16, or the first of all pairs and then the
// second.
template <bool kPairs>
constexpr int64_t kVectorFloats = kPairs ? 16 : 32;

// Codes of vector first + i, first being a multiple of 16: the even (offset 0) or odd (16) of each lane's
// pair.
template <int kBits>
PYSPEC_INLINE I16 code(const uint8_t* low, const uint8_t* high, int64_t first, int i, int offset) {
  constexpr int kLow = kBits == 3 ? 2 : kBits, kShare = 16 / kLow;
  I16 words = load_words(low + (first + i) / kShare * 64);
  I16 field = bit_field(words, offset + kLow * (i % kShare), (1 << kLow) - 1);
  if constexpr (kBits == 3) {
    field = join_bits(field, bit_field(load_words(high + first / 16 * 64), offset + i, 1), 2);
  }
  return field;
}

#if PYSPEC_HAS_AVX512
// Numbers are looked up: the instruction reads only the low bits of an index.
template <int kBits>
PYSPEC_INLINE void look_up(const uint8_t* codes, int64_t head_dim, float* tile) {
  constexpr int kShare = 16 / kBits;
  alignas(64) float numbers[16];
  for (int i = 0; i < 16; ++i) numbers[i] = static_cast<float>(i % (1 << kBits)) - ((1 << kBits) - 1) / 2.0f;
  __m512 table = _mm512_load_ps(numbers);
  for (int64_t first = 0; first < 2 * head_dim; first += kShare, codes += 64) {
    __m512i words = _mm512_loadu_si512(codes);
#pragma GCC unroll 16
    for (int i = 0; i < kShare; ++i, tile += 32) {
      __m512i even = _mm512_srlv_epi32(words, _mm512_set1_epi32(kBits * i));
      __m512i odd = _mm512_srlv_epi32(words, _mm512_set1_epi32(kBits * i + 16));
      _mm512_store_ps(tile, _mm512_permutexvar_ps(even, table));
      _mm512_store_ps(tile + 16, _mm512_permutexvar_ps(odd, table));
    }
  }
}
#endif

#if PYSPEC_HAS_BF16_DOT
template <int kBits>
PYSPEC_INLINE void look_up_pairs(const uint8_t* codes, const uint8_t* high, int64_t head_dim, float* tile) {
  constexpr int kLow = kBits == 3 ? 2 : kBits, kShare = 16 / kLow;
  alignas(64) uint16_t numbers[32];
  for (int i = 0; i < 32; ++i) {
    float number = static_cast<float>(i % (1 << kBits)) - ((1 << kBits) - 1) / 2.0f;
    uint32_t bits;
    std::memcpy(&bits, &number, 4);
    numbers[i] = static_cast<uint16_t>(bits >> 16);  // exact: at most 8 bits
  }
  __m512i table = _mm512_load_si512(numbers);
  for (int64_t first = 0; first < 2 * head_dim; first += 16, high += 64) {
    __m512i top = kBits == 3 ? _mm512_loadu_si512(high) : _mm512_setzero_si512();
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i, tile += 16) {
      __m512i words = _mm512_loadu_si512(codes + (first + i) / kShare * 64);
      __m512i index = _mm512_srlv_epi16(words, _mm512_set1_epi16(kLow * (i % kShare)));
      if constexpr (kBits == 3) {
        __m512i bit = _mm512_and_si512(_mm512_srlv_epi16(top, _mm512_set1_epi16(i)), _mm512_set1_epi16(1));
        index = _mm512_and_si512(index, _mm512_set1_epi16(3));
        index = _mm512_or_si512(index, _mm512_slli_epi16(bit, 2));
      }
      _mm512_store_si512(tile, _mm512_permutexvar_epi16(index, table));
    }
  }
}
#endif

// The 2 * head_dim vectors of a half.
template <int kBits, bool kPairs>
PYSPEC_INLINE void unpack(const uint8_t* codes, int64_t head_dim, float* tile) {
  const uint8_t* high = codes + kHalf * head_dim * 2 / 8;  // of 3 bits
#if PYSPEC_HAS_BF16_DOT
  if constexpr (kPairs && kBits < 8) return look_up_pairs<kBits>(codes, high, head_dim, tile);
#endif
#if PYSPEC_HAS_AVX512
  if constexpr (!kPairs && (kBits == 2 || kBits == 4)) return look_up<kBits>(codes, head_dim, tile);
#endif
  F16 middle = set1(((1 << kBits) - 1) / 2.0f);
  for (int64_t first = 0; first < 2 * head_dim; first += 16) {
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i, tile += kVectorFloats<kPairs>) {
      F16 even = sub(to_float(code<kBits>(codes, high, first, i, 0)), middle);
      F16 odd = sub(to_float(code<kBits>(codes, high, first, i, 16)), middle);
#if PYSPEC_HAS_BF16_DOT
      if constexpr (kPairs) {
        store(tile, pair(even, odd));
        continue;
      }
#endif
      store(tile, even);
      store(tile + 16, odd);
    }
  }
}

// Writes an outlier over lane j of the first (i = 0) or second numbers of a vector.
template <bool kPairs>
PYSPEC_INLINE void place(float* tile, int64_t vector, int64_t j, int64_t i, BFloat16 value) {
  if constexpr (kPairs) {
    reinterpret_cast<uint16_t*>(tile)[vector * 32 + 2 * j + i] = value.bits;
  } else {
    tile[vector * 32 + 16 * i + j] = to_float(value);
  }
}

// ==== the two products ====

// sums[r][v] += the two numbers of each lane times the row's two factors, which lie side by side.
template <bool kPairs, int kRows, int kVectors>
PYSPEC_INLINE void multiply(const float* tile, const char* factors, int64_t row_bytes,
                            F16 (&sums)[kRows][kVectors]) {
  constexpr int kParts = kPairs ? 1 : 2;
  for (int i = 0; i < kParts; ++i) {
    F16 numbers[kVectors];
    for (int v = 0; v < kVectors; ++v) numbers[v] = load(tile + v * kVectorFloats<kPairs> + 16 * i);
    for (int r = 0; r < kRows; ++r) {
      F16 factor = broadcast(factors + r * row_bytes + 4 * i);
      for (int v = 0; v < kVectors; ++v) {
#if PYSPEC_HAS_BF16_DOT
        if constexpr (kPairs) {
          sums[r][v] = pair_dot(numbers[v], factor, sums[r][v]);
          continue;
        }
#endif
        sums[r][v] = fma(numbers[v], factor, sums[r][v]);
      }
    }
  }
}

template <bool kPairs>
PYSPEC_INLINE void store_factors(char* to, F16 values) {
#if PYSPEC_HAS_BF16_DOT
  if constexpr (kPairs) {
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), (__m256i)_mm512_cvtneps_pbh(values.v));
    return;
  }
#endif
  store(to, values);
}

struct Scratch {
  alignas(64) float tile[2 * kMostHeadDim * 32];
  alignas(64) float factors[kGearRows * kMostHeadDim];                   // queries or weights times scales
  alignas(64) float weights[kGearRows][kBlock];                          // scores, then weights
  alignas(64) float sums[kGearRows][16];                                 // of the weights, by lane
  alignas(64) float middles[kGearRows][kMostHeadDim / kLeastGroup][16];  // weights times middles, by lane
  alignas(64) float scale[kBlock / kLeastGroup * kMostHeadDim], middle[kBlock / kLeastGroup * kMostHeadDim];
  alignas(64) float a[kMostRank][kBlock], b[kMostRank][kMostHeadDim];
  alignas(64) float low[kGearRows][kMostRank];  // queries times b
  alignas(64) float bias[kGearRows];            // queries times middles
  alignas(64) float before[kGearRows], now[kGearRows], alpha[kGearRows];
  bool visible[kGearRows];
  alignas(64) float unused[16];
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

template <class Storage, bool kPairs>
struct Kernel {
  static constexpr int64_t kFactorBytes = kPairs ? 2 : 4;

  const GearAttentionParams& p;
  GearSide keys, values;
  int64_t d, group, width, rank, outliers, heads_a_group, row_count, sets, max_chunks, values_offset;
  float middle_code, score_factor;
  float *queries, *states;

  explicit Kernel(const GearAttentionParams& params)
      : p(params),
        keys(params.format, params.head_dim, false),
        values(params.format, params.head_dim, true),
        d(params.head_dim),
        group(params.format.group),
        width(params.format.group < d ? params.format.group : d),
        rank(params.format.rank),
        outliers(params.format.outliers),
        heads_a_group(params.heads / params.kv_heads),
        row_count(params.nodes * heads_a_group),
        sets(pyspec::gear_row_sets(params)),
        max_chunks(pyspec::gear_chunks(params.most_seen)),
        values_offset(keys.bytes),
        middle_code(static_cast<float>((1 << params.format.bits) - 1) / 2),
        score_factor(params.scale * kLog2E),
        queries(params.workspace),
        states(queries + p.batch * p.kv_heads * sets * kGearRows * d) {}

  int64_t rows(int64_t set) const {  // of a set, filled up to what a pass takes
    int64_t left = row_count - set * kGearRows;
    left = (left + kPassRows - 1) / kPassRows * kPassRows;
    return left < kGearRows ? left : kGearRows;
  }
  int64_t seen(int64_t b, int64_t row) const {
    return row < row_count ? p.seen[b * p.nodes + row / heads_a_group] : 0;
  }
  int64_t most_seen(int64_t b, int64_t set) const {
    int64_t most = 0;
    for (int64_t r = 0; r < kGearRows; ++r) {
      int64_t row = seen(b, set * kGearRows + r);
      most = row > most ? row : most;
    }
    return most;
  }
  float* query(int64_t sequence_head, int64_t row) const {
    return queries + (sequence_head * sets * kGearRows + row) * d;
  }
  float* state(int64_t sequence_head, int64_t chunk, int64_t row) const {  // values, max, sum
    return states + ((sequence_head * max_chunks + chunk) * sets * kGearRows + row) * (d + 2);
  }

  // ==== queries in fp32, rotated where the keys are ====

  void pack_queries(int64_t sequence_head) const {
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    for (int64_t row = 0; row < sets * kGearRows; ++row) {
      float* to = query(sequence_head, row);
      if (row >= row_count) {
        std::memset(to, 0, d * sizeof(float));
        continue;
      }
      const Storage* from = static_cast<const Storage*>(p.q) + b * p.q_strides[0] +
                            (h * heads_a_group + row % heads_a_group) * p.q_strides[1] +
                            row / heads_a_group * p.q_strides[2];
      convert_row(from, to, d);
      if (p.format.rotate) rotate(to, d);
    }
  }

  // ==== one side of a record ====

  void read_scales(Scratch& s, const uint8_t* side, const GearSide& at, int64_t count) const {
    const Float16* scale = reinterpret_cast<const Float16*>(side + at.scale);
    const Float16* zero = reinterpret_cast<const Float16*>(side + at.zero);
    for (int64_t i = 0; i < count; i += 16) {
      F16 step = load_as_float(scale + i);
      store(s.scale + i, step);
      store(s.middle + i, fma(step, set1(middle_code), load_as_float(zero + i)));
    }
  }

  void read_low_rank(Scratch& s, const uint8_t* side, const GearSide& at) const {
    for (int64_t k = 0; k < rank; ++k) {
      float factor;
      std::memcpy(&factor, side + at.factor + 4 * k, 4);
      const int8_t* a = reinterpret_cast<const int8_t*>(side + at.a) + k * kBlock;
      const int8_t* b = reinterpret_cast<const int8_t*>(side + at.b) + k * d;
      for (int64_t i = 0; i < kBlock; i += 16) store(s.a[k] + i, load_as_float(a + i));
      for (int64_t i = 0; i < d; i += 16) store(s.b[k] + i, mul(set1(factor), load_as_float(b + i)));
    }
  }

  void unpack_half(Scratch& s, const uint8_t* side, const GearSide& at, int64_t half) const {
    const uint8_t* codes = side + at.codes + half * at.half_codes;
    switch (p.format.bits) {
      case 2:
        return unpack<2, kPairs>(codes, d, s.tile);
      case 3:
        return unpack<3, kPairs>(codes, d, s.tile);
      case 4:
        return unpack<4, kPairs>(codes, d, s.tile);
      default:
        return unpack<8, kPairs>(codes, d, s.tile);
    }
  }

  void place_key_outliers(Scratch& s, const uint8_t* side, int64_t half) const {
    const BFloat16* values = reinterpret_cast<const BFloat16*>(side + keys.outlier_values);
    const uint8_t* indices = side + keys.outlier_indices;
    for (int64_t o = 0; o < outliers; ++o, values += d, indices += d) {
      for (int64_t c = 0; c < d; ++c) {
        int64_t token = indices[c] % kHalf;
        bool here = indices[c] / kHalf == half;  // else written where nobody reads: a branch would be guessed
        float* tile = here ? s.tile : s.unused;
        int64_t vector = here ? c / 2 * 4 + token / 16 : 0;
        place<kPairs>(tile, vector, here ? token % 16 : 0, here ? c % 2 : 0, values[c]);
      }
    }
  }

  void place_value_outliers(Scratch& s, const uint8_t* side, int64_t half) const {
    const BFloat16* outlier = reinterpret_cast<const BFloat16*>(side + values.outlier_values) + half * kHalf;
    const uint8_t* indices = side + values.outlier_indices + half * kHalf;
    for (int64_t o = 0; o < outliers; ++o, outlier += kBlock, indices += kBlock) {
      for (int64_t token = 0; token < kHalf; ++token) {
        int64_t c = indices[token];
        place<kPairs>(s.tile, token / 2 * (d / 16) + c / 16, c % 16, token % 2, outlier[token]);
      }
    }
  }

  // ==== scores ====

  // factors[row] = query * scale, bias[row] = query . middle, of one group of tokens.
  void scale_queries(Scratch& s, const float* query, int64_t count, int64_t which) const {
    const float *scale = s.scale + which * d, *middle = s.middle + which * d;
    for (int64_t r = 0; r < count; ++r, query += d) {
      F16 bias = set1(0.0f);
      char* to = reinterpret_cast<char*>(s.factors) + r * d * kFactorBytes;
      for (int64_t c = 0; c < d; c += 16) {
        F16 x = load(query + c);
        store_factors<kPairs>(to + c * kFactorBytes, mul(x, load(scale + c)));
        bias = fma(x, load(middle + c), bias);
      }
      s.bias[r] = sum(bias);
    }
  }

  void multiply_low_rank(Scratch& s, const float* query, int64_t count) const {
    for (int64_t r = 0; r < count; ++r, query += d) {
      for (int64_t k = 0; k < rank; ++k) {
        F16 product = set1(0.0f);
        for (int64_t c = 0; c < d; c += 16) product = fma(load(query + c), load(s.b[k] + c), product);
        s.low[r][k] = sum(product);
      }
    }
  }

  // Of kPassRows rows and kVectors * 16 tokens from `token` of the block on.
  template <int kVectors>
  PYSPEC_INLINE void score_pass(Scratch& s, int64_t row, int64_t token) const {
    F16 sums[kPassRows][kVectors];
    for (int r = 0; r < kPassRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = set1(0.0f);
    const float* tile = s.tile + token % kHalf / 16 * kVectorFloats<kPairs>;
    const char* factors = reinterpret_cast<const char*>(s.factors) + row * d * kFactorBytes;
    for (int64_t pair = 0; pair < d / 2; ++pair) {
      multiply<kPairs, kPassRows, kVectors>(tile + pair * 4 * kVectorFloats<kPairs>,
                                            factors + pair * 2 * kFactorBytes, d * kFactorBytes, sums);
    }
    for (int r = 0; r < kPassRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        F16 score = add(sums[r][v], set1(s.bias[row + r]));
        for (int64_t k = 0; k < rank; ++k)
          score = fma(set1(s.low[row + r][k]), load(s.a[k] + token + 16 * v), score);
        store(s.weights[row + r] + token + 16 * v, score);
      }
    }
  }

  void score(Scratch& s, const uint8_t* record, const float* query, int64_t count) const {
    read_scales(s, record, keys, kBlock / group * d);
    if (rank) {
      read_low_rank(s, record, keys);
      multiply_low_rank(s, query, count);
    }
    for (int64_t token = 0; token < kBlock; token += kPassVectors * 16) {
      if (token % kHalf == 0) {
        unpack_half(s, record, keys, token / kHalf);
        place_key_outliers(s, record, token / kHalf);
      }
      if (kPassVectors * 16 <= kLeastGroup || group > kLeastGroup) {
        if (token % group == 0) scale_queries(s, query, count, token / group);
        for (int64_t row = 0; row < count; row += kPassRows) score_pass<kPassVectors>(s, row, token);
      } else {
        for (int64_t part = token; part < token + kPassVectors * 16; part += kLeastGroup) {
          scale_queries(s, query, count, part / group);
          for (int64_t row = 0; row < count; row += kPassRows) score_pass<kLeastGroup / 16>(s, row, part);
        }
      }
    }
  }

  // ==== scores to weights ====

  void weigh(Scratch& s, int64_t count) const {
    F16 factor = set1(score_factor);
    for (int64_t r = 0; r < count; ++r) {
      F16 largest = set1(-kInfinity);
      for (int64_t i = 0; i < kBlock; i += 16) largest = max(load(s.weights[r] + i), largest);
      float in_block = highest(largest) * score_factor;
      s.now[r] = s.visible[r] && in_block > s.before[r] ? in_block : s.before[r];
    }
    for (int64_t r = 0; r < count; r += 16) {
      F16 now = load(s.now + r), safe = where_less(set1(-kInfinity), now, now, set1(0.0f));
      store(s.alpha + r, exp2(sub(load(s.before + r), safe)));
      store(s.before + r, now);
      store(s.now + r, safe);
    }
    for (int64_t r = 0; r < count; ++r) {
      if (!s.visible[r]) {
        std::memset(s.weights[r], 0, sizeof s.weights[r]);
        s.alpha[r] = 1.0f;
        continue;
      }
      F16 minus_safe = set1(-s.now[r]), total = mul(load(s.sums[r]), set1(s.alpha[r]));
      for (int64_t i = 0; i < kBlock; i += 16) {
        F16 weight = exp2(fma(load(s.weights[r] + i), factor, minus_safe));
        total = add(total, weight);
        store(s.weights[r] + i, weight);
      }
      store(s.sums[r], total);
    }
  }

  // ==== values ====

  // factors[row] = weight * scale and middles[row] += weight * middle, of a half and a group of channels.
  void scale_weights(Scratch& s, int64_t count, int64_t which, int64_t half) const {
    const float *scale = s.scale + which * kBlock + half * kHalf,
                *middle = s.middle + which * kBlock + half * kHalf;
    for (int64_t r = 0; r < count; ++r) {
      char* to = reinterpret_cast<char*>(s.factors) + r * kHalf * kFactorBytes;
      F16 total = load(s.middles[r][which]);
      if (half == 0) total = mul(total, set1(s.alpha[r]));
      for (int64_t i = 0; i < kHalf; i += 16) {
        F16 weight = load(s.weights[r] + half * kHalf + i);
        store_factors<kPairs>(to + i * kFactorBytes, mul(weight, load(scale + i)));
        total = fma(weight, load(middle + i), total);
      }
      store(s.middles[r][which], total);
    }
  }

  // Into kPassRows rows of kVectors * 16 channels.
  template <int kVectors>
  PYSPEC_INLINE void value_pass(Scratch& s, float* out, int64_t row, int64_t channel, int64_t half) const {
    F16 sums[kPassRows][kVectors];
    for (int r = 0; r < kPassRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = load(out + (row + r) * (d + 2) + channel + 16 * v);
        if (half == 0) sums[r][v] = mul(sums[r][v], set1(s.alpha[row + r]));
      }
    }
    const float* tile = s.tile + channel / 16 * kVectorFloats<kPairs>;
    const char* factors = reinterpret_cast<const char*>(s.factors) + row * kHalf * kFactorBytes;
    for (int64_t pair = 0; pair < kHalf / 2; ++pair) {
      multiply<kPairs, kPassRows, kVectors>(tile + pair * (d / 16) * kVectorFloats<kPairs>,
                                            factors + pair * 2 * kFactorBytes, kHalf * kFactorBytes, sums);
    }
    for (int r = 0; r < kPassRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(out + (row + r) * (d + 2) + channel + 16 * v, sums[r][v]);
  }

  template <int kVectors>
  PYSPEC_INLINE void value_rows(Scratch& s, float* out, int64_t count, int64_t channel, int64_t half) const {
    for (int64_t row = 0; row < count; row += kPassRows) value_pass<kVectors>(s, out, row, channel, half);
  }

  void add_values(Scratch& s, const uint8_t* side, float* out, int64_t count) const {
    read_scales(s, side, values, d / width * kBlock);
    for (int64_t half = 0; half < 2; ++half) {
      unpack_half(s, side, values, half);
      place_value_outliers(s, side, half);
      for (int64_t which = 0; which < d / width; ++which) {
        scale_weights(s, count, which, half);
        int64_t channel = which * width, end = channel + width;
        for (; channel + kPassVectors * 16 <= end; channel += kPassVectors * 16)
          value_rows<kPassVectors>(s, out, count, channel, half);
        for (; channel + 32 <= end; channel += 32) value_rows<2>(s, out, count, channel, half);
        for (; channel < end; channel += 16) value_rows<1>(s, out, count, channel, half);
      }
    }
    if (!rank) return;
    read_low_rank(s, side, values);
    for (int64_t r = 0; r < count; ++r, out += d + 2) {
      for (int64_t k = 0; k < rank; ++k) {
        F16 product = set1(0.0f);
        for (int64_t i = 0; i < kBlock; i += 16)
          product = fma(load(s.weights[r] + i), load(s.a[k] + i), product);
        F16 weight = set1(sum(product));
        for (int64_t c = 0; c < d; c += 16) store(out + c, fma(weight, load(s.b[k] + c), load(out + c)));
      }
    }
  }

  // ==== phase 1: a chunk of blocks ====

  void fold_chunk(int64_t item) const {
    int64_t chunk = item % max_chunks, sequence_head = item / max_chunks;
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    const uint8_t* first_record = p.packed + b * p.packed_strides[0] + h * p.packed_strides[1];
    Scratch& s = scratch();
    for (int64_t set = 0; set < sets; ++set) {
      int64_t most = most_seen(b, set), end = pyspec::gear_first_block(chunk + 1), count = rows(set);
      end = end < most ? end : most;
      int64_t block = pyspec::gear_first_block(chunk);
      if (block >= end) continue;
      float* out = state(sequence_head, chunk, set * kGearRows);
      std::memset(out, 0, count * (d + 2) * sizeof(float));
      std::memset(s.sums, 0, sizeof s.sums);
      std::memset(s.middles, 0, sizeof s.middles);
      for (int64_t r = 0; r < kGearRows; ++r) s.before[r] = -kInfinity, s.now[r] = 0.0f;
      const float* query = this->query(sequence_head, set * kGearRows);
      for (; block < end; ++block) {
        const uint8_t* record = first_record + block * p.packed_strides[2];
        for (int64_t r = 0; r < count; ++r) s.visible[r] = block < seen(b, set * kGearRows + r);
        score(s, record, query, count);
        weigh(s, count);
        add_values(s, record + values_offset, out, count);
      }
      for (int64_t r = 0; r < count; ++r, out += d + 2) {
        for (int64_t which = 0; which < d / width; ++which) {
          F16 middle = set1(sum(load(s.middles[r][which])));
          for (int64_t c = which * width; c < (which + 1) * width; c += 16)
            store(out + c, add(load(out + c), middle));
        }
        out[d] = s.before[r];
        out[d + 1] = sum(load(s.sums[r]));
      }
    }
  }

  // ==== phase 2: a row's chunks in order ====

  void finish_set(int64_t item) const {
    int64_t set = item % sets, sequence_head = item / sets;
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    alignas(64) float merged[kMostHeadDim];
    for (int64_t r = 0; r < kGearRows; ++r) {
      int64_t row = set * kGearRows + r;
      if (row >= row_count) return;
      float max = -kInfinity, sum = 0.0f;
      for (int64_t i = 0; i < d; ++i) merged[i] = 0.0f;
      for (int64_t chunk = 0; pyspec::gear_first_block(chunk) < seen(b, row); ++chunk) {
        const float* from = state(sequence_head, chunk, row);
        float largest = from[d] > max ? from[d] : max, safe = largest == -kInfinity ? 0.0f : largest;
        F16 weight = exp2(set1(max - safe)), other = exp2(set1(from[d] - safe));
        for (int64_t i = 0; i < d; i += 16)
          store(merged + i, fma(load(from + i), other, mul(load(merged + i), weight)));
        alignas(64) float sums[16];
        store(sums, fma(set1(from[d + 1]), other, mul(set1(sum), weight)));
        max = largest, sum = sums[0];
      }
      int64_t head = h * heads_a_group + row % heads_a_group, node = row / heads_a_group;
      Storage* out = static_cast<Storage*>(p.out) + b * p.out_strides[0] + head * p.out_strides[1] +
                     node * p.out_strides[2];
      F16 factor = set1(sum == 0.0f ? 0.0f : 1.0f / sum);
      for (int64_t i = 0; i < d; i += 16) store_as(out + i, mul(load(merged + i), factor));
      p.lse[(b * p.heads + head) * p.nodes + node] =
          sum == 0.0f ? -kInfinity : (max + __builtin_log2f(sum)) * kLn2;
    }
  }

  void run() const {
    int64_t sequence_heads = p.batch * p.kv_heads;
    auto pack = [&](int64_t item) { pack_queries(item); };
    auto chunk = [&](int64_t item) { fold_chunk(item); };
    auto finish = [&](int64_t item) { finish_set(item); };
    pyspec::parallel(p.parallel_for, sequence_heads, pack);
    pyspec::parallel(p.parallel_for, sequence_heads * max_chunks, chunk);
    pyspec::parallel(p.parallel_for, sequence_heads * sets, finish);
  }
};

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_gear_packed_attention)(const GearAttentionParams& p) {
  switch (p.element) {
    case pyspec::Element::kFloat32:
      return Kernel<float, false>(p).run();
    case pyspec::Element::kFloat16:
      return Kernel<Float16, false>(p).run();
    case pyspec::Element::kBFloat16:
#if PYSPEC_HAS_BF16_DOT
      return Kernel<BFloat16, true>(p).run();
#endif
      return Kernel<BFloat16, false>(p).run();
  }
}
