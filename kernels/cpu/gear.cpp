// Attention to quantised keys and values, read where they lie. The codes of 64 tokens at a time become small
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
// Where keys have fewer channels than there are, each record gathers its own from the queries.
//
// Few rows are bound by unpacking (a shift, a table look-up and a store for 16 codes) and by multiply-adds.
#include "params/gear.h"

#include <optional>

#include "cpu/gear_records.h"

namespace {

// Sums that stay in registers: rows of a pass, and vectors of tokens or channels. Numbers of a tile are read
// once for all rows of a pass, so where registers are few, many rows take one vector at a time: of 16
// registers of 8 lanes, 8 are sums, 2 numbers and 1 a factor.
#if PYSPEC_HAS_AVX512
constexpr int kPassRows = 4, kPassVectors = 4;
constexpr int kManyRows = 8, kManyVectors = 2;
#else
constexpr int kPassRows = 2, kPassVectors = 2;
constexpr int kManyRows = 4, kManyVectors = 1;
#endif

// kTiles: pairs go through tile registers.
template <class Storage, bool kPairs, bool kTiles = false>
struct Kernel : GearRecords<Storage, kPairs> {
  using Records = GearRecords<Storage, kPairs>;
  using Records::d, Records::p, Records::row_count, Records::seen, Records::oldest, Records::kTokens;
  using Records::keys, Records::values, Records::key_dim, Records::group, Records::width, Records::rank,
      Records::outliers;
  static constexpr int64_t kFactorBytes = kPairs ? 2 : 4;

  int64_t sets, max_chunks, state_floats;
  float score_factor;
  float *queries, *states;

  explicit Kernel(const GearAttentionParams& params)
      : Records(params),
        sets(pyspec::gear_row_sets(params)),
        max_chunks(pyspec::gear_chunks(params.most_seen)),
        state_floats(pyspec::gear_state_floats(d)),
        score_factor(params.scale * kLog2E),
        queries(params.workspace),
        states(queries + p.batch * p.kv_heads * sets * kGearRows * d) {}

  int64_t rows(int64_t set) const {  // of a set, filled up to what a pass takes
    int64_t left = row_count - set * kGearRows, pass = kTiles && left > 16 ? 16 : kPassRows;
    left = (left + pass - 1) / pass * pass;
    return left < kGearRows ? left : kGearRows;
  }
  int64_t most_seen(int64_t b, int64_t set) const {
    int64_t most = 0;
    for (int64_t r = 0; r < kGearRows; ++r) {
      int64_t row = seen(b, set * kGearRows + r);
      most = row > most ? row : most;
    }
    return most;
  }
  // The first block that a row of a set sees something of.
  int64_t first_seen(int64_t b, int64_t set) const {
    int64_t row = set * kGearRows, end = row + kGearRows < row_count ? row + kGearRows : row_count;
    int64_t least = oldest(b, row);
    for (; row < end; ++row) least = oldest(b, row) < least ? oldest(b, row) : least;
    return least / kBlock;
  }
  float* query(int64_t sequence_head, int64_t row) const {
    return queries + (sequence_head * sets * kGearRows + row) * d;
  }
  float* state(int64_t sequence_head, int64_t chunk, int64_t row) const {  // values, max, sum
    return states + ((sequence_head * max_chunks + chunk) * sets * kGearRows + row) * state_floats;
  }

  // ==== queries in fp32 ====

  void pack_queries(int64_t sequence_head) const {
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    for (int64_t row = 0; row < sets * kGearRows; ++row) {
      float* to = query(sequence_head, row);
      if (row >= row_count) {
        std::memset(to, 0, d * sizeof(float));
        continue;
      }
      this->read_query(b, h, row, to);
    }
  }

  // ==== scores ====

  // Rows of queries [count][key_dim], in the channels that the record's keys have.
  const float* gather_queries(Scratch& s, const uint8_t* record, const float* query, int64_t count) const {
    const uint8_t* channels = record + keys.channels;
    for (int64_t r = 0; r < count; ++r) {
      for (int64_t c = 0; c < key_dim; ++c)
        s.gathered[r * key_dim + c] = channels[c] < d ? query[r * d + channels[c]] : 0.0f;
    }
    return s.gathered;
  }

  // factors[row] = query * scale, bias[row] = query . middle, of one group of tokens.
  void scale_queries(Scratch& s, const float* query, int64_t count, int64_t which) const {
    const float *scale = s.scale + which * key_dim, *middle = s.middle + which * key_dim;
    for (int64_t r = 0; r < count; ++r, query += key_dim) {
      F16 bias = set1(0.0f);
      char* to = reinterpret_cast<char*>(s.factors) + r * key_dim * kFactorBytes;
      for (int64_t c = 0; c < key_dim; c += 16) {
        F16 x = load(query + c);
        store_factors<kPairs>(to + c * kFactorBytes, mul(x, load(scale + c)));
        bias = fma(x, load(middle + c), bias);
      }
      s.bias[r] = sum(bias);
    }
  }

  void multiply_low_rank(Scratch& s, const float* query, int64_t count) const {
    for (int64_t r = 0; r < count; ++r, query += key_dim) {
      for (int64_t k = 0; k < rank; ++k) {
        F16 product = set1(0.0f);
        for (int64_t c = 0; c < key_dim; c += 16) product = fma(load(query + c), load(s.b[k] + c), product);
        s.low[r][k] = sum(product);
      }
    }
  }

  // Of kRows rows and kVectors * 16 tokens from `token` of the block on.
  template <int kRows, int kVectors>
  PYSPEC_INLINE void score_pass(Scratch& s, int64_t row, int64_t token) const {
    F16 sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) sums[r][v] = set1(0.0f);
    const float* tile = s.tile + token % kTokens / 16 * kVectorFloats<kPairs>;
    const char* factors = reinterpret_cast<const char*>(s.factors) + row * key_dim * kFactorBytes;
    for (int64_t pair = 0; pair < key_dim / 2; ++pair) {
      multiply<kPairs, kRows, kVectors>(tile + pair * (kTokens / 16) * kVectorFloats<kPairs>,
                                        factors + pair * 2 * kFactorBytes, key_dim * kFactorBytes, sums);
    }
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) store_score(s, row + r, token + 16 * v, sums[r][v]);
    }
  }

  // Of a row and 16 tokens, from the products of numbers.
  PYSPEC_INLINE void store_score(Scratch& s, int64_t row, int64_t token, F16 products) const {
    F16 score = add(products, set1(s.bias[row]));
    for (int64_t k = 0; k < rank; ++k) score = fma(set1(s.low[row][k]), load(s.a[k] + token), score);
    store(s.weights[row] + token, score);
  }

#if PYSPEC_HAS_AMX
  // Scores of kLeastGroup tokens.
  void score_in_tiles(Scratch& s, int64_t count, int64_t token) const {
    constexpr int64_t kPairFloats = kTokens / 16 * kVectorFloats<kPairs>;
    const float* numbers = s.tile + token % kTokens / 16 * kVectorFloats<kPairs>;
    for (int64_t row = 0; row < count; row += kTiledRows) {
      const char* factors = reinterpret_cast<const char*>(s.factors) + row * key_dim * kFactorBytes;
      multiply_in_tiles<false>(factors, key_dim * kFactorBytes, numbers, kPairFloats, key_dim / 32,
                               s.weights[row] + token, kBlock);
    }
    for (int64_t row = 0; row < count; ++row) {
      for (int64_t i = 0; i < kLeastGroup; i += 16)
        store_score(s, row, token + i, load(s.weights[row] + token + i));
    }
  }

  // Adds a part to kLeastGroup channels.
  void value_in_tiles(Scratch& s, float* out, int64_t count, int64_t channel, int64_t part) const {
    for (int64_t r = 0; part == 0 && r < count; ++r) {
      for (int64_t c = channel; c < channel + kLeastGroup; c += 16) {
        float* at = out + r * state_floats + c;
        store(at, mul(load(at), set1(s.alpha[r])));
      }
    }
    for (int64_t row = 0; row < count; row += kTiledRows) {
      const char* factors = reinterpret_cast<const char*>(s.factors) + row * kTokens * kFactorBytes;
      multiply_in_tiles<true>(factors, kTokens * kFactorBytes, s.tile + channel, d, kTokens / 32,
                              out + row * state_floats + channel, state_floats);
    }
  }
#endif

  void score(Scratch& s, const uint8_t* record, const float* query, int64_t count) const {
    if (key_dim < d) query = gather_queries(s, record, query, count);
    this->read_scales(s, record, keys, kBlock / group * key_dim);
    if (outliers) this->read_outliers(s, record, false);
    if (rank) {
      this->read_low_rank(s, record, false);
      multiply_low_rank(s, query, count);
    }
    for (int64_t token = 0; token < kBlock; token += kLeastGroup) {
      if (token % kTokens == 0) this->unpack_part(s, record, false, token / kTokens);
      if (token % group == 0) scale_queries(s, query, count, token / group);
#if PYSPEC_HAS_AMX
      if constexpr (kTiles) {
        score_in_tiles(s, count, token);
        continue;
      }
#endif
      int64_t row = 0;
      for (; row + kManyRows <= count; row += kManyRows) {
        for (int64_t i = 0; i < kLeastGroup; i += 16 * kManyVectors)
          score_pass<kManyRows, kManyVectors>(s, row, token + i);
      }
      for (; row < count; row += kPassRows) score_pass<kPassRows, kLeastGroup / 16>(s, row, token);
    }
  }

  // ==== values ====

  // factors[row] = weight * scale and middles[row] += weight * middle, of a part and a group of channels.
  void scale_weights(Scratch& s, int64_t count, int64_t which, int64_t part) const {
    const float *scale = s.scale + which * kBlock + part * kTokens,
                *middle = s.middle + which * kBlock + part * kTokens;
    for (int64_t r = 0; r < count; ++r) {
      char* to = reinterpret_cast<char*>(s.factors) + r * kTokens * kFactorBytes;
      F16 total = load(s.middles[r][which]);
      if (part == 0) total = mul(total, set1(s.alpha[r]));
      for (int64_t i = 0; i < kTokens; i += 16) {
        F16 weight = load(s.weights[r] + part * kTokens + i);
        store_factors<kPairs>(to + i * kFactorBytes, mul(weight, load(scale + i)));
        total = fma(weight, load(middle + i), total);
      }
      store(s.middles[r][which], total);
    }
  }

  // Into kRows rows of kVectors * 16 channels.
  template <int kRows, int kVectors>
  PYSPEC_INLINE void value_pass(Scratch& s, float* out, int64_t row, int64_t channel, int64_t part) const {
    F16 sums[kRows][kVectors];
    for (int r = 0; r < kRows; ++r) {
      for (int v = 0; v < kVectors; ++v) {
        sums[r][v] = load(out + (row + r) * state_floats + channel + 16 * v);
        if (part == 0) sums[r][v] = mul(sums[r][v], set1(s.alpha[row + r]));
      }
    }
    const float* tile = s.tile + channel / 16 * kVectorFloats<kPairs>;
    const char* factors = reinterpret_cast<const char*>(s.factors) + row * kTokens * kFactorBytes;
    for (int64_t pair = 0; pair < kTokens / 2; ++pair) {
      multiply<kPairs, kRows, kVectors>(tile + pair * (d / 16) * kVectorFloats<kPairs>,
                                        factors + pair * 2 * kFactorBytes, kTokens * kFactorBytes, sums);
    }
    for (int r = 0; r < kRows; ++r)
      for (int v = 0; v < kVectors; ++v) store(out + (row + r) * state_floats + channel + 16 * v, sums[r][v]);
  }

  template <int kVectors>
  PYSPEC_INLINE void value_rows(Scratch& s, float* out, int64_t count, int64_t channel, int64_t part) const {
    int64_t row = 0;
    if constexpr (kManyVectors == 1) {
      for (; row + kManyRows <= count; row += kManyRows) {
        for (int64_t i = 0; i < kVectors; ++i) value_pass<kManyRows, 1>(s, out, row, channel + 16 * i, part);
      }
    }
    for (; row < count; row += kPassRows) value_pass<kPassRows, kVectors>(s, out, row, channel, part);
  }

  void add_values(Scratch& s, const uint8_t* side, float* out, int64_t count) const {
    this->read_scales(s, side, values, d / width * kBlock);
    if (outliers) this->read_outliers(s, side, true);
    for (int64_t part = 0; part < kBlock / kTokens; ++part) {
      this->unpack_part(s, side, true, part);
      for (int64_t which = 0; which < d / width; ++which) {
        scale_weights(s, count, which, part);
        int64_t channel = which * width, end = channel + width;
#if PYSPEC_HAS_AMX
        for (; kTiles && channel < end; channel += kLeastGroup) value_in_tiles(s, out, count, channel, part);
#endif
        for (; channel + kPassVectors * 16 <= end; channel += kPassVectors * 16)
          value_rows<kPassVectors>(s, out, count, channel, part);
        for (; channel + 32 <= end; channel += 32) value_rows<2>(s, out, count, channel, part);
        for (; channel < end; channel += 16) value_rows<1>(s, out, count, channel, part);
      }
    }
    if (!rank) return;
    this->read_low_rank(s, side, true);
    for (int64_t r = 0; r < count; ++r, out += state_floats) {
      for (int64_t k = 0; k < rank; ++k) {
        F16 product = set1(0.0f);
        for (int64_t i = 0; i < kBlock; i += 16)
          product = fma(load(s.weights[r] + i), load(s.a[k] + i), product);
        s.low[r][k] = sum(product);
      }
      for (int64_t c = 0; c < d; c += 16) {
        F16 value = load(out + c);
        for (int64_t k = 0; k < rank; ++k) value = fma(set1(s.low[r][k]), load(s.b[k] + c), value);
        store(out + c, value);
      }
    }
  }

  // ==== phase 1: a chunk of blocks ====

  void fold_chunk(int64_t item) const {
    int64_t chunk = item % max_chunks, sequence_head = item / max_chunks;
    int64_t b = sequence_head / p.kv_heads, h = sequence_head % p.kv_heads;
    const uint8_t* first_record = p.quantised + b * p.quantised_strides[0] + h * p.quantised_strides[1];
    Scratch& s = scratch();
    if (outliers) this->lay_out(s);
    for (int64_t set = 0; set < sets; ++set) {
      int64_t most = most_seen(b, set), end = pyspec::gear_first_block(chunk + 1), count = rows(set);
      end = end < most ? end : most;
      int64_t block = pyspec::gear_first_block(chunk), first = first_seen(b, set);
      block =
          first > block ? first : block;  // a block that no row sees changes no bit of a row that sees others
      if (block >= end) continue;
#if PYSPEC_HAS_AMX
      std::optional<TileConfig> config;
      if constexpr (kTiles) config.emplace(count < kTiledRows ? count : kTiledRows);
#endif
      float* out = state(sequence_head, chunk, set * kGearRows);
      std::memset(out, 0, count * state_floats * sizeof(float));
      std::memset(s.sums, 0, sizeof s.sums);
      std::memset(s.middles, 0, sizeof s.middles);
      for (int64_t r = 0; r < kGearRows; ++r) s.before[r] = -kInfinity, s.now[r] = 0.0f;
      const float* query = this->query(sequence_head, set * kGearRows);
      for (; block < end; ++block) {
        const uint8_t* record = first_record + block * p.quantised_strides[2];
        score(s, record, query, count);
        this->hide(s, b, set, count, block);
        weigh(s, count, score_factor);
        add_values(s, record + keys.bytes, out, count);
      }
      for (int64_t r = 0; r < count; ++r, out += state_floats) {
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
    for (int64_t row = set * kGearRows; row < (set + 1) * kGearRows && row < row_count; ++row) {
      int64_t block = oldest(b, row) / kBlock, most = seen(b, row);
      int64_t end = block < most ? pyspec::gear_chunks(most) : 0;
      this->merge_chunks(b, h, row, end ? pyspec::gear_chunks(block + 1) - 1 : 0, end,
                         [&](int64_t chunk) { return state(sequence_head, chunk, row); });
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

extern "C" void PYSPEC_ENTRY(pyspec_gear)(const GearAttentionParams& p) {
  switch (p.element) {
    case pyspec::Element::kFloat32:
      return Kernel<float, false>(p).run();
    case pyspec::Element::kFloat16:
      return Kernel<Float16, false>(p).run();
    case pyspec::Element::kBFloat16:
#if PYSPEC_HAS_AMX
      if (p.head_dim % 32 == 0 && p.format.key_channels % 32 == 0)
        return Kernel<BFloat16, true, true>(p).run();
#endif
#if PYSPEC_HAS_BF16_DOT
      return Kernel<BFloat16, true>(p).run();
#endif
      return Kernel<BFloat16, false>(p).run();
  }
}
