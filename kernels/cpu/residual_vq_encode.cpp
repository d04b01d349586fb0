// Quantises a block of keys or values: scales, then level by level the codeword nearest to what is left. One
// item is one side of one record; nothing in it depends on what is quantised beside it.
//
//   nearest = the first least of |C[j]|^2 / 2 - x . C[j], in fp32
//
// Codes are the lanes, so codewords are transposed once a level; eight vectors share each load of them.
#include "cpu/simd.h"
#include "cpu/vq_codes.h"
#include "params/residual_vq.h"

namespace {

using pyspec::kVqBlock;
using pyspec::kVqMostCodes;
using pyspec::kVqWidth;
using pyspec::VqEncodeParams;

constexpr int64_t kMostHeadDim = 256;
constexpr float kLargest = 65504.0f;  // of fp16
#if PYSPEC_HAS_AVX512
constexpr int kVectors = 8, kTiles = 2;
#else
constexpr int kVectors = 2, kTiles = 2;
#endif

struct Scratch {
  alignas(64) float row[kMostHeadDim];
  alignas(64) float left[kVqBlock * kMostHeadDim];   // [group][token][32]
  alignas(64) float words[kVqWidth * kVqMostCodes];  // of a level, transposed
  alignas(64) float half_norms[kVqMostCodes];
  uint16_t codes[kVqBlock];
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

// Standard deviation of a row, unbiased.
float deviation(const float* x, int64_t d) {
  F16 total = set1(0.0f);
  for (int64_t i = 0; i < d; i += 16) total = add(total, load(x + i));
  F16 mean = set1(sum(total) / static_cast<float>(d)), squares = set1(0.0f);
  for (int64_t i = 0; i < d; i += 16) {
    F16 off = sub(load(x + i), mean);
    squares = fma(off, off, squares);
  }
  return __builtin_sqrtf(sum(squares) / static_cast<float>(d - 1));
}

// The codes of kVectors vectors that lie one after another.
void find_nearest(const Scratch& s, const float* left, int64_t codes, uint16_t* found) {
  F16 least[kVectors], place[kVectors];
  for (int v = 0; v < kVectors; ++v) least[v] = set1(kInfinity), place[v] = set1(0.0f);
  alignas(64) float lanes[16];
  for (int i = 0; i < 16; ++i) lanes[i] = static_cast<float>(i);
  F16 lane = load(lanes);
  for (int64_t code = 0; code < codes; code += 16 * kTiles) {
    F16 products[kVectors][kTiles];
    for (int v = 0; v < kVectors; ++v)
      for (int t = 0; t < kTiles; ++t) products[v][t] = set1(0.0f);
    for (int64_t c = 0; c < kVqWidth; ++c) {
      F16 words[kTiles];
      for (int t = 0; t < kTiles; ++t) words[t] = load(s.words + c * codes + code + 16 * t);
      for (int v = 0; v < kVectors; ++v) {
        F16 x = set1(left[v * kVqWidth + c]);
        for (int t = 0; t < kTiles; ++t) products[v][t] = fma(x, words[t], products[v][t]);
      }
    }
    for (int t = 0; t < kTiles; ++t) {
      F16 half_norm = load(s.half_norms + code + 16 * t);
      F16 here = add(lane, set1(static_cast<float>(code + 16 * t)));
      for (int v = 0; v < kVectors; ++v) {
        F16 distance = sub(half_norm, products[v][t]);
        place[v] = where_less(distance, least[v], here, place[v]);
        least[v] = min(distance, least[v]);
      }
    }
  }
  for (int v = 0; v < kVectors; ++v) {
    alignas(64) float distances[16], places[16];
    store(distances, least[v]), store(places, place[v]);
    int best = 0;
    for (int i = 1; i < 16; ++i) {
      if (distances[i] < distances[best] || (distances[i] == distances[best] && places[i] < places[best]))
        best = i;
    }
    found[v] = static_cast<uint16_t>(places[best]);
  }
}

template <class Storage>
void encode_side(const VqEncodeParams& p, int64_t index, bool values) {
  int64_t block = index % p.blocks, h = index / p.blocks % p.kv_heads, b = index / p.blocks / p.kv_heads;
  int64_t d = p.head_dim, groups = d / kVqWidth, depth = p.format.depth, codes = p.format.codes;
  const int64_t* strides = values ? p.v_strides : p.k_strides;
  const Storage* from = static_cast<const Storage*>(values ? p.v : p.k) + b * strides[0] + h * strides[1];
  int64_t record = pyspec::vq_record_bytes(p.format, d), side = pyspec::vq_side_bytes(p.format, d);
  uint8_t* out = p.quantised + index * record + (values ? side : 0);
  Scratch& s = scratch();
  for (int64_t token = 0; token < kVqBlock; ++token) {
    convert_row(from + (block * kVqBlock + token) * strides[2], s.row, d);
    float scale = deviation(s.row, d);
    Float16 half;
    from_float(scale < kLargest ? scale : kLargest, &half);
    if (half.bits == 0) from_float(1.0f, &half);
    std::memcpy(out + 2 * token, &half, 2);
    float divisor = to_float(half);
    for (int64_t c = 0; c < d; ++c) {
      int64_t group = values ? c / kVqWidth : c % groups, i = values ? c % kVqWidth : c / groups;
      s.left[(group * kVqBlock + token) * kVqWidth + i] = s.row[c] / divisor;
    }
  }
  uint8_t* to = out + 2 * kVqBlock;
  int64_t level_bytes = pyspec::vq_level_bytes(p.format);
  for (int64_t level = 0; level < depth; ++level) {
    const uint16_t* words =
        p.codebooks + b * p.codebooks_stride + ((values ? depth : 0) + level) * codes * kVqWidth;
    transpose_codewords(words, codes, s.words);
    for (int64_t code = 0; code < codes; code += 16) {
      F16 norm = set1(0.0f);
      for (int64_t c = 0; c < kVqWidth; ++c) {
        F16 x = load(s.words + c * codes + code);
        norm = fma(x, x, norm);
      }
      store(s.half_norms + code, mul(norm, set1(0.5f)));
    }
    for (int64_t group = 0; group < groups; ++group) {
      float* left = s.left + group * kVqBlock * kVqWidth;
      for (int64_t token = 0; token < kVqBlock; token += kVectors)
        find_nearest(s, left + token * kVqWidth, codes, s.codes + token);
      for (int64_t token = 0; token < kVqBlock; ++token) {
        const Float16* word = reinterpret_cast<const Float16*>(words) + s.codes[token] * kVqWidth;
        for (int64_t c = 0; c < kVqWidth; c += 16) {
          float* x = left + token * kVqWidth + c;
          store(x, sub(load(x), load_as_float(word + c)));
        }
      }
      pack_codes(s.codes, pyspec::vq_planes(p.format), to + (group * depth + level) * level_bytes);
    }
  }
  if (values) std::memset(out + side, 0, record - 2 * side);
}

template <class Storage>
void encode(const VqEncodeParams& p) {
  auto item = [&](int64_t index) { encode_side<Storage>(p, index / 2, index % 2 == 1); };
  pyspec::parallel(p.parallel_for, 2 * p.batch * p.kv_heads * p.blocks, item);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_residual_vq_encode)(const VqEncodeParams& p) {
  with_element(p.element, [&](auto element) { encode<decltype(element)>(p); });
}
