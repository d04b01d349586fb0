// Attention to keys and values that are sums of codewords, without rebuilding either:
//
//   table[g][l][j] = q_g . C_l[j]                  once for a query row
//   score          = scale * sum over g, l of table[g][l][code]
//   mass[g][l][j]  = sum of weight * scale over the tokens whose code is j
//   out_g          = sum over l, j of mass[g][l][j] C_l[j]          once for a chunk of 4096 tokens
//
// The rows of a set are the lanes: a code is loaded once for all of them, and its table entries, or masses,
// lie side by side. A pass takes as many levels as keep their tables, or masses, in the first-level cache,
// over a run of tokens whose scores lie there too. Nothing a row sums depends on the rows beside it, nor on
// the number of lanes: table entries in the order of levels, masses in that of tokens. That is the row rule.
//
// A token costs a load and an add for each code and set of rows, for its values a store too; a table costs
// head_dim * depth * codes multiply-adds for each row, and so does a chunk. Keys that were coded before
// rotary embedding have no tables: vq_turned.h.
#include "params/residual_vq.h"

#include "cpu/quantised_rows.h"
#include "cpu/vq_codes.h"
#include "cpu/vq_turned.h"

namespace {

using pyspec::kVqBlock;
using pyspec::kVqChunkBlocks;
using pyspec::kVqMostCodes;
using pyspec::kVqWidth;
using pyspec::VqAttentionParams;

constexpr int64_t kMostRows = TurnedBlock::kMostRows;
constexpr int64_t kRunBlocks = 4;  // whose scores stay in the first-level cache

// kRows floats. The compiler's own vectors: on every instruction set there are instructions for 4 of them.
template <int kRows>
struct LanesOf;
template <>
struct LanesOf<4> {
  typedef float Lanes __attribute__((vector_size(16), may_alias));
};
template <>
struct LanesOf<16> {
  typedef float Lanes __attribute__((vector_size(64), may_alias));
};

struct Scratch {
  alignas(64) float scores[kVqChunkBlocks * kVqBlock * kMostRows];  // [token][row], then weights
  alignas(64) float mass[4 * kVqMostCodes * kMostRows];             // [level of the pass][code][row]
  alignas(64) float codewords[kVqMostCodes * kVqWidth];             // of a level of the values
  alignas(64) float queries[kMostRows][kMostHeadDim];
  alignas(64) float row[kMostRows][kVqMostCodes];  // of a table, before rows are woven
  alignas(64) float out[kMostRows * kMostHeadDim];
  alignas(64) float scales[kVqBlock];
  uint16_t codes[4][kVqBlock];  // where they are not bytes
  TurnedBlock turned;
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

template <class Storage, int kRows>
struct Kernel : PackedRows<Storage, VqAttentionParams> {
  using Rows = PackedRows<Storage, VqAttentionParams>;
  using Rows::d, Rows::p, Rows::row_count, Rows::seen, Rows::oldest;
  using Lanes = typename LanesOf<kRows>::Lanes;
  static constexpr int kLevels = kRows == 4 ? 4 : 1;  // of a pass

  int64_t groups, depth, codes, sets, chunks, level_bytes, side_bytes;
  float *words, *tables, *places, *states;

  explicit Kernel(const VqAttentionParams& params)
      : Rows(params),
        groups(d / kVqWidth),
        depth(params.format.depth),
        codes(params.format.codes),
        sets(pyspec::vq_sets(params)),
        chunks(pyspec::vq_chunks(params.most_seen)),
        level_bytes(pyspec::vq_level_bytes(params.format)),
        side_bytes(pyspec::vq_side_bytes(params.format, d)),
        words(params.workspace),
        tables(words + depth * kVqWidth * codes),
        places(tables + p.batch * p.kv_heads * sets * pyspec::vq_table_floats(p)),
        states(places + pyspec::vq_place_floats(p)) {}

  float* table(int64_t set_item, int64_t group) const {
    return tables + (set_item * groups + group) * depth * codes * kRows;
  }
  float* state(int64_t set_item, int64_t chunk, int64_t row) const {  // values, max, sum
    return states + ((set_item * chunks + chunk) * kRows + row) * pyspec::vq_state_floats(d);
  }

  // The queries of a set of rows, and how many there are.
  int64_t read_queries(Scratch& s, int64_t set_item) const {
    int64_t set = set_item % sets, b = set_item / sets / p.kv_heads, h = set_item / sets % p.kv_heads;
    int64_t rows = row_count - set * kRows < kRows ? row_count - set * kRows : kRows;
    for (int64_t r = 0; r < rows; ++r) this->read_query(b, h, set * kRows + r, s.queries[r]);
    return rows;
  }

  // ==== phase 1: codewords of a level of the keys in fp32 ====

  // [32][codes], or for keys that are to be turned [codes][32].
  void convert_level(int64_t level) const {
    const uint16_t* from = p.codebooks + level * codes * kVqWidth;
    float* to = words + level * codes * kVqWidth;
    if (p.rotary) return convert_row(reinterpret_cast<const Float16*>(from), to, codes * kVqWidth);
    transpose_codewords(from, codes, to);
  }

  // ==== phase 2: the tables of a set of rows and a group of channels ====

  void fill_table(int64_t item) const {
    int64_t group = item % groups, set_item = item / groups;
    Scratch& s = scratch();
    int64_t rows = read_queries(s, set_item);
    float* to = table(set_item, group);
    std::memset(to, 0, depth * codes * kRows * sizeof(float));  // rows that are not there
    for (int64_t level = 0; level < depth; ++level, to += codes * kRows) {
      const float* of_level = words + level * kVqWidth * codes;
      for (int64_t r = 0; r < rows; ++r) {
        for (int64_t code = 0; code < codes; code += 128) {
          F16 sums[8];
          for (int i = 0; i < 8; ++i) sums[i] = set1(0.0f);
          for (int64_t c = 0; c < kVqWidth; ++c) {
            F16 x = set1(s.queries[r][c * groups + group]);
            for (int i = 0; i < 8; ++i) sums[i] = fma(x, load(of_level + c * codes + code + 16 * i), sums[i]);
          }
          for (int i = 0; i < 8; ++i) store(s.row[r] + code + 16 * i, sums[i]);
        }
      }
      for (int64_t code = 0; code < codes; ++code)
        for (int64_t r = 0; r < rows; ++r) to[code * kRows + r] = s.row[r][code];
    }
  }

  // ==== phase 3: a chunk of blocks ====

  // Adds the entries of kCount levels to the scores of a block's tokens.
  template <int kCount, class Code>
  PYSPEC_INLINE void add_entries(const Code* const (&code)[kCount], const float* table, float* scores) const {
    for (int64_t token = 0; token < kVqBlock; ++token) {
      Lanes sum = *reinterpret_cast<const Lanes*>(scores + token * kRows);
      for (int i = 0; i < kCount; ++i)
        sum += *reinterpret_cast<const Lanes*>(table + (i * codes + code[i][token]) * kRows);
      *reinterpret_cast<Lanes*>(scores + token * kRows) = sum;
    }
  }
  // Adds the weights of a block's tokens to the masses of kCount levels.
  template <int kCount, class Code>
  PYSPEC_INLINE void add_masses(const Code* const (&code)[kCount], float* mass, const float* weights) const {
    for (int64_t token = 0; token < kVqBlock; ++token) {
      Lanes weight = *reinterpret_cast<const Lanes*>(weights + token * kRows);
      for (int i = 0; i < kCount; ++i)
        *reinterpret_cast<Lanes*>(mass + (i * codes + code[i][token]) * kRows) += weight;
    }
  }

  // Calls body with the codes of a block's kCount levels, which begin at `quantised`.
  template <int kCount, class Body>
  PYSPEC_INLINE void with_codes(Scratch& s, const uint8_t* quantised, const Body& body) const {
    if (codes == 256) {
      const uint8_t* code[kCount];
      for (int i = 0; i < kCount; ++i) code[i] = quantised + i * level_bytes;
      body(code);
      return;
    }
    const uint16_t* code[kCount];
    for (int i = 0; i < kCount; ++i) {
      unpack_codes(quantised + i * level_bytes, s.codes[i]);
      code[i] = s.codes[i];
    }
    body(code);
  }

  template <int kCount>
  void score_pass(Scratch& s, const uint8_t* codes_of_level, int64_t blocks, const float* table,
                  float* scores) const {
    for (int64_t block = 0; block < blocks; ++block) {
      float* of_block = scores + block * kVqBlock * kRows;
      with_codes<kCount>(s, codes_of_level + block * p.quantised_strides[2],
                         [&](const auto& code) { add_entries<kCount>(code, table, of_block); });
    }
  }

  // Of a chunk's tokens, by the tables of its set.
  void score_by_tables(Scratch& s, int64_t set_item, const uint8_t* first, int64_t blocks) const {
    std::memset(s.scores, 0, blocks * kVqBlock * kRows * sizeof(float));
    for (int64_t run = 0; run < blocks; run += kRunBlocks) {
      int64_t count = blocks - run < kRunBlocks ? blocks - run : kRunBlocks;
      float* scores = s.scores + run * kVqBlock * kRows;
      for (int64_t group = 0; group < groups; ++group) {
        const uint8_t* at = first + run * p.quantised_strides[2] + 2 * kVqBlock + group * depth * level_bytes;
        const float* entries = table(set_item, group);
        int64_t level = 0;
        for (; level + kLevels <= depth; level += kLevels)
          score_pass<kLevels>(s, at + level * level_bytes, count, entries + level * codes * kRows, scores);
        for (; level < depth; ++level)
          score_pass<1>(s, at + level * level_bytes, count, entries + level * codes * kRows, scores);
      }
    }
  }

  template <int kCount>
  void rebuild_pass(Scratch& s, const uint8_t* codes_of_level, int64_t level) const {
    const float* from = words + level * codes * kVqWidth;
    with_codes<kCount>(s, codes_of_level,
                       [&](const auto& code) { s.turned.template add_codewords<kCount>(code, from, codes); });
  }

  // Of a chunk's tokens, by keys that are rebuilt and turned; `block` is the first.
  void score_turned(Scratch& s, int64_t set_item, const uint8_t* record, int64_t block,
                    int64_t blocks) const {
    int64_t rows = read_queries(s, set_item);
    for (float* scores = s.scores; blocks > 0; --blocks, ++block, scores += kVqBlock * kRows) {
      s.turned.turn_queries(s.queries, rows, d, p.rotary + (kVqBlock + block) * d);
      for (int64_t group = 0; group < groups; ++group) {
        const uint8_t* at = record + 2 * kVqBlock + group * depth * level_bytes;
        std::memset(s.turned.group, 0, sizeof s.turned.group);
        int64_t level = 0;
        for (; level + 4 <= depth; level += 4) rebuild_pass<4>(s, at + level * level_bytes, level);
        for (; level < depth; ++level) rebuild_pass<1>(s, at + level * level_bytes, level);
        s.turned.turn_group(group, groups, d, places);
      }
      s.turned.template multiply<kRows>(d, scores);
      record += p.quantised_strides[2];
    }
  }

  template <int kCount>
  void value_pass(Scratch& s, const uint8_t* codes_of_level, int64_t blocks, int64_t level,
                  float* out) const {
    std::memset(s.mass, 0, kCount * codes * kRows * sizeof(float));
    for (int64_t block = 0; block < blocks; ++block) {
      const float* weights = s.scores + block * kVqBlock * kRows;
      with_codes<kCount>(s, codes_of_level + block * p.quantised_strides[2],
                         [&](const auto& code) { add_masses<kCount>(code, s.mass, weights); });
    }
    for (int i = 0; i < kCount; ++i) add_codewords(s, level + i, s.mass + i * codes * kRows, out);
  }

  // out [row][32] += mass . codewords, in the order of codes; rows at a distance of d.
  void add_codewords(Scratch& s, int64_t level, const float* mass, float* out) const {
    const Float16* words = reinterpret_cast<const Float16*>(p.codebooks) + (depth + level) * codes * kVqWidth;
    convert_row(words, s.codewords, codes * kVqWidth);
    for (int64_t row = 0; row < kRows; row += 4) {
      F16 sums[4][2];
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 2; ++i) sums[r][i] = load(out + (row + r) * d + 16 * i);
      for (int64_t code = 0; code < codes; ++code) {
        F16 first = load(s.codewords + code * kVqWidth), second = load(s.codewords + code * kVqWidth + 16);
        for (int r = 0; r < 4; ++r) {
          F16 factor = set1(mass[code * kRows + row + r]);
          sums[r][0] = fma(factor, first, sums[r][0]);
          sums[r][1] = fma(factor, second, sums[r][1]);
        }
      }
      for (int r = 0; r < 4; ++r)
        for (int i = 0; i < 2; ++i) store(out + (row + r) * d + 16 * i, sums[r][i]);
    }
  }

  // Scores times scales, -inf where a row does not see the token; the largest of each row. Rows see the first
  // `visible` blocks but for the first `hidden` tokens.
  void scale_scores(Scratch& s, const uint8_t* first, int64_t blocks, const int64_t (&visible)[kRows],
                    const int64_t (&hidden)[kRows], float (&largest)[kRows]) const {
    Lanes most = {}, minus_infinity = most - kInfinity;
    most = minus_infinity;
    float factor = p.scale * kLog2E;
    for (int64_t block = 0; block < blocks; ++block) {
      convert_row(reinterpret_cast<const Float16*>(first + block * p.quantised_strides[2]), s.scales,
                  kVqBlock);
      float* scores = s.scores + block * kVqBlock * kRows;
      bool is_seen = true;
      for (int r = 0; r < kRows; ++r) is_seen &= block < visible[r] && hidden[r] <= block * kVqBlock;
      for (int64_t token = 0; token < kVqBlock; ++token) {
        Lanes& score = *reinterpret_cast<Lanes*>(scores + token * kRows);
        score *= s.scales[token] * factor;
        if (!is_seen) {
          for (int r = 0; r < kRows; ++r)
            if (block >= visible[r] || block * kVqBlock + token < hidden[r])
              scores[token * kRows + r] = -kInfinity;
        }
        most = score > most ? score : most;
      }
    }
    std::memcpy(largest, &most, sizeof largest);
  }

  // Scores to weights, their sums in the order of tokens; then weights times the scales of the values.
  void weigh(Scratch& s, const uint8_t* first, int64_t blocks, const float (&largest)[kRows],
             float (&total)[kRows]) const {
    alignas(64) float safe[16];
    for (int i = 0; i < 16; ++i) safe[i] = largest[i % kRows] == -kInfinity ? 0.0f : largest[i % kRows];
    F16 minus = sub(set1(0.0f), load(safe));
    Lanes sum = {};
    for (int64_t block = 0; block < blocks; ++block) {
      convert_row(reinterpret_cast<const Float16*>(first + block * p.quantised_strides[2] + side_bytes),
                  s.scales, kVqBlock);
      float* weights = s.scores + block * kVqBlock * kRows;
      for (int64_t i = 0; i < kVqBlock * kRows; i += 16)
        store(weights + i, exp2(add(load(weights + i), minus)));
      for (int64_t token = 0; token < kVqBlock; ++token) {
        Lanes& weight = *reinterpret_cast<Lanes*>(weights + token * kRows);
        sum += weight;
        weight *= s.scales[token];
      }
    }
    std::memcpy(total, &sum, sizeof total);
  }

  void fold_chunk(int64_t item) const {
    int64_t chunk = item % chunks, set_item = item / chunks, set = set_item % sets;
    int64_t b = set_item / sets / p.kv_heads, h = set_item / sets % p.kv_heads;
    Scratch& s = scratch();
    int64_t visible[kRows], hidden[kRows], blocks = 0, begin = oldest(b, set * kRows) / kVqBlock;
    for (int r = 0; r < kRows && set * kRows + r < row_count; ++r) {
      int64_t block = oldest(b, set * kRows + r) / kVqBlock;
      begin = block < begin ? block : begin;
    }
    begin = begin > chunk * kVqChunkBlocks ? begin : chunk * kVqChunkBlocks;  // no row sees those before
    for (int r = 0; r < kRows; ++r) {
      int64_t row = set * kRows + r, end = seen(b, row);
      end = end < (chunk + 1) * kVqChunkBlocks ? end : (chunk + 1) * kVqChunkBlocks;
      visible[r] = end - begin, hidden[r] = oldest(b, row) - begin * kVqBlock;
      blocks = visible[r] > blocks ? visible[r] : blocks;
      if (row >= row_count) visible[r] = kVqChunkBlocks;  // it is masked by its own result only
    }
    if (blocks == 0) return;
    const uint8_t* first = p.quantised + b * p.quantised_strides[0] + h * p.quantised_strides[1] +
                           begin * p.quantised_strides[2];
    if (p.rotary) {
      score_turned(s, set_item, first, begin, blocks);
    } else {
      score_by_tables(s, set_item, first, blocks);
    }
    float largest[kRows], total[kRows];
    scale_scores(s, first, blocks, visible, hidden, largest);
    weigh(s, first, blocks, largest, total);
    std::memset(s.out, 0, kRows * d * sizeof(float));
    for (int64_t group = 0; group < groups; ++group) {
      const uint8_t* at = first + side_bytes + 2 * kVqBlock + group * depth * level_bytes;
      float* out = s.out + group * kVqWidth;
      int64_t level = 0;
      for (; level + kLevels <= depth; level += kLevels)
        value_pass<kLevels>(s, at + level * level_bytes, blocks, level, out);
      for (; level < depth; ++level) value_pass<1>(s, at + level * level_bytes, blocks, level, out);
    }
    for (int r = 0; r < kRows; ++r) {
      float* to = state(set_item, chunk, r);
      std::memcpy(to, s.out + r * d, d * sizeof(float));
      to[d] = largest[r], to[d + 1] = total[r];
    }
  }

  // ==== phase 4: a row's chunks in order ====

  void finish_set(int64_t set_item) const {
    int64_t set = set_item % sets, b = set_item / sets / p.kv_heads, h = set_item / sets % p.kv_heads;
    for (int64_t r = 0; r < kRows && set * kRows + r < row_count; ++r) {
      int64_t row = set * kRows + r;
      int64_t block = oldest(b, row) / kVqBlock, most = seen(b, row);
      int64_t end = block < most ? pyspec::vq_chunks(most) : 0;
      this->merge_chunks(b, h, row, block / kVqChunkBlocks, end,
                         [&](int64_t chunk) { return state(set_item, chunk, r); });
    }
  }

  void run() const {
    int64_t set_items = p.batch * p.kv_heads * sets;
    auto level = [&](int64_t item) { convert_level(item); };
    auto place = [&](int64_t tile) { lay_out_places(p.rotary, d, tile, places + tile * 16 * d); };
    auto fill = [&](int64_t item) { fill_table(item); };
    auto chunk = [&](int64_t item) { fold_chunk(item); };
    auto finish = [&](int64_t item) { finish_set(item); };
    if (chunks > 0) {
      pyspec::parallel(p.parallel_for, depth, level);
      if (p.rotary) {
        pyspec::parallel(p.parallel_for, TurnedBlock::kTiles, place);
      } else {
        pyspec::parallel(p.parallel_for, set_items * groups, fill);
      }
      pyspec::parallel(p.parallel_for, set_items * chunks, chunk);
    }
    pyspec::parallel(p.parallel_for, set_items, finish);
  }
};

template <class Storage>
void attend(const VqAttentionParams& p) {
  pyspec::vq_set_rows(p) == 4 ? Kernel<Storage, 4>(p).run() : Kernel<Storage, 16>(p).run();
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_residual_vq)(const VqAttentionParams& p) {
  with_element(p.element, [&](auto element) { attend<decltype(element)>(p); });
}
