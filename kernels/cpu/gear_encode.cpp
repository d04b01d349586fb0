// Quantises a block of keys and values into a record: outliers out, a range for each group, then low rank of
// what is left by power iteration. One item is one record; nothing in it depends on the records beside it.
// With ranges from the smallest to the largest value, backbone and outliers are the reference's to the byte.
// Fitted ranges are tried at several widths and moved to the least squares of their codes; then low rank and
// backbone take turns, each fitted to what the other leaves.
#include "cpu/gear_ranges.h"
#include "cpu/simd.h"
#include "params/gear.h"

namespace {

using pyspec::GearEncodeParams;
using pyspec::GearFormat;
using pyspec::GearSide;
using pyspec::kBlock;
using pyspec::kHalf;
using pyspec::kMostOutliers;
using pyspec::kMostRank;

constexpr int64_t kMostHeadDim = kMostLength;
constexpr int kPasses = 3;             // of the power iteration
constexpr int kRounds = 4;             // of low rank and backbone, when fitted to each other
constexpr float kIndependent = 1e-3f;  // of its length that a column must have left beside those before it

struct Scratch {
  alignas(64) float x[kBlock * kMostHeadDim];         // [token][channel]
  alignas(64) float vectors[kBlock * kMostHeadDim];   // the same, vector after vector
  alignas(64) float kept[kBlock * kMostHeadDim];      // 0 for outliers, else 1
  alignas(64) float left[kBlock * kMostHeadDim];      // vectors without low rank
  alignas(64) float residual[kBlock * kMostHeadDim];  // [token][channel]
  alignas(64) float a[kMostRank][kBlock], b[kMostRank][kMostHeadDim];
  uint8_t codes[kBlock * kMostHeadDim];  // [token][channel]
  uint8_t outliers[kMostHeadDim][kMostOutliers];
};

Scratch& scratch() {
  static thread_local Scratch* instance = new Scratch();
  return *instance;
}

// The count largest (sign 1) or smallest (sign -1), the first of equals first.
void pick(const float* x, int64_t length, int64_t count, float sign, uint8_t* indices) {
  for (int64_t o = 0; o < count; ++o) {
    int64_t best = -1;
    for (int64_t i = 0; i < length; ++i) {
      bool taken = false;
      for (int64_t other = 0; other < o; ++other) taken |= indices[other] == i;
      if (!taken && (best < 0 || sign * x[i] > sign * x[best])) best = i;
    }
    indices[o] = static_cast<uint8_t>(best);
  }
}

// ==== low rank ====

float dot(const float* a, const float* b, int64_t n) {
  F16 total = set1(0.0f);
  for (int64_t i = 0; i < n; i += 16) total = fma(load(a + i), load(b + i), total);
  return sum(total);
}
void add_scaled(float* to, const float* from, float factor, int64_t n) {
  for (int64_t i = 0; i < n; i += 16) store(to + i, fma(load(from + i), set1(factor), load(to + i)));
}

// Each column orthogonal to those before it and of length 1, or 0 where nothing is left of it.
template <int64_t kStride>
void orthonormalise(float (*columns)[kStride], int64_t rank, int64_t n) {
  for (int64_t k = 0; k < rank; ++k) {
    float length = __builtin_sqrtf(dot(columns[k], columns[k], n));
    for (int turn = 0; turn < 2; ++turn) {  // once leaves what rounding made
      for (int64_t other = 0; other < k; ++other)
        add_scaled(columns[k], columns[other], -dot(columns[k], columns[other], n), n);
    }
    float left = __builtin_sqrtf(dot(columns[k], columns[k], n));
    for (int64_t i = 0; i < n; ++i)
      columns[k][i] = left > kIndependent * length ? columns[k][i] / left : 0.0f;
  }
}

void power_iteration(Scratch& s, int64_t rank, int64_t d) {
  for (int64_t c = 0; c < d; ++c) {
    for (int64_t k = 0; k < rank; ++k) {
      uint64_t number = static_cast<uint64_t>(c * rank + k + 1) * 2654435761u;
      s.b[k][c] = static_cast<float>(number >> 16 & 0xffff) / 65536.0f - 0.5f;
    }
  }
  for (int pass = 0; pass < kPasses; ++pass) {
    orthonormalise(s.b, rank, d);
    for (int64_t k = 0; k < rank; ++k)
      for (int64_t token = 0; token < kBlock; ++token) s.a[k][token] = dot(s.residual + token * d, s.b[k], d);
    orthonormalise(s.a, rank, kBlock);
    std::memset(s.b, 0, sizeof s.b);
    for (int64_t token = 0; token < kBlock; ++token)
      for (int64_t k = 0; k < rank; ++k) add_scaled(s.b[k], s.residual + token * d, s.a[k][token], d);
  }
}

// A column in int8, and what to multiply it by.
float to_int8(const float* x, int64_t n, int8_t* to) {
  float largest = 0.0f;
  for (int64_t i = 0; i < n; ++i) largest = __builtin_fabsf(x[i]) > largest ? __builtin_fabsf(x[i]) : largest;
  float step = largest / 127;
  for (int64_t i = 0; i < n; ++i) to[i] = static_cast<int8_t>(step > 0 ? __builtin_rintf(x[i] / step) : 0.0f);
  return step;
}

// ==== codes to words ====

void pack(const uint8_t* codes, const GearFormat& f, int64_t d, bool values, uint8_t* out) {
  for (int64_t half = 0; half < 2; ++half) {
    const uint8_t* from = codes + half * kHalf * d;
    int64_t low = 0;
    for (int64_t plane = f.bits == 3 ? 2 : f.bits; low < f.bits; low += plane, plane = 1) {
      int64_t share = 16 / plane;
      for (int64_t first = 0; first < 2 * d; first += share, out += 64) {
        uint16_t words[32] = {};
        for (int64_t i = 0; i < share; ++i) {
          int64_t vector = first + i, fast = values ? vector % (d / 16) : vector % 4,
                  slow = values ? vector / (d / 16) : vector / 4;
          for (int64_t lane = 0; lane < 32; ++lane) {
            int64_t near = lane / 2 + 16 * fast, far = 2 * slow + lane % 2;
            int64_t code = values ? from[far * d + near] : from[near * d + far];
            words[lane] |= static_cast<uint16_t>((code >> low & ((1 << plane) - 1)) << plane * i);
          }
        }
        std::memcpy(out, words, 64);
      }
    }
  }
}

// ==== one side of a record: s.x, keys or values, to out ====

struct Side {
  Scratch& s;
  const GearFormat& f;
  GearSide at;
  uint8_t* out;
  int64_t d, vectors, length, group;
  bool values;
  float levels;

  Side(Scratch& scratch, const GearFormat& format, int64_t head_dim, bool is_values, uint8_t* to)
      : s(scratch),
        f(format),
        at(format, head_dim, is_values),
        out(to),
        d(head_dim),
        vectors(is_values ? kBlock : d),
        length(is_values ? d : kBlock),
        group(is_values && format.group > d ? d : format.group),
        values(is_values),
        levels(static_cast<float>((int64_t{1} << format.bits) - 1)) {}

  int64_t place(int64_t vector, int64_t i) const { return values ? vector * d + i : i * d + vector; }
  Group group_of(const float* from, int64_t vector, int64_t g) const {
    int64_t start = vector * length + g * group;
    return {from + start, s.kept + start, group, levels};
  }
  Range range(int64_t vector, int64_t g) const {
    Range found;
    std::memcpy(&found.zero, out + at.zero + 2 * (g * vectors + vector), 2);
    std::memcpy(&found.scale, out + at.scale + 2 * (g * vectors + vector), 2);
    return found;
  }
  void set_range(int64_t vector, int64_t g, Range range) const {
    std::memcpy(out + at.zero + 2 * (g * vectors + vector), &range.zero, 2);
    std::memcpy(out + at.scale + 2 * (g * vectors + vector), &range.scale, 2);
  }

  void take_outliers() const {
    int64_t half = f.outliers / 2;
    for (int64_t vector = 0; vector < vectors; ++vector) {
      float *y = s.vectors + vector * length, *kept = s.kept + vector * length;
      for (int64_t i = 0; i < length; ++i) y[i] = s.x[place(vector, i)], kept[i] = 1.0f;
      uint8_t* indices = s.outliers[vector];
      pick(y, length, half, 1.0f, indices);
      pick(y, length, half, -1.0f, indices + half);
      for (int64_t o = 0; o < f.outliers; ++o) kept[indices[o]] = 0.0f;
    }
  }

  // Codes of what s.left holds, in ranges that are moved to it or as they are, and what they leave of the
  // vectors.
  void quantise(bool move) const {
    alignas(64) float codes[kMostLength];
    for (int64_t vector = 0; vector < vectors; ++vector) {
      for (int64_t g = 0; g < length / group; ++g) {
        Group from = group_of(s.left, vector, g);
        Range at_range = range(vector, g);
        find_codes(from, at_range, codes);
        if (move) {
          at_range = least_squares(from, codes);
          set_range(vector, g, at_range);
          find_codes(from, at_range, codes);
        }
        float zero = to_float(at_range.zero), scale = to_float(at_range.scale);
        Group whole = group_of(s.vectors, vector, g);
        for (int64_t i = 0; i < group; ++i) {
          int64_t to = place(vector, g * group + i);
          s.codes[to] = static_cast<uint8_t>(codes[i]);
          s.residual[to] = whole.kept[i] == 0.0f ? 0.0f : whole.values[i] - (zero + scale * codes[i]);
        }
      }
    }
  }

  // Low rank of the residual to the record, and the vectors without it to s.left.
  void fit_low_rank() const {
    power_iteration(s, f.rank, d);
    std::memcpy(s.left, s.vectors, vectors * length * sizeof(float));
    for (int64_t k = 0; k < f.rank; ++k) {
      int8_t* a = reinterpret_cast<int8_t*>(out + at.a) + k * kBlock;
      int8_t* b = reinterpret_cast<int8_t*>(out + at.b) + k * d;
      float factor = to_int8(s.a[k], kBlock, a);
      factor *= to_int8(s.b[k], d, b);
      std::memcpy(out + at.factor + 4 * k, &factor, 4);
      const int8_t *own = values ? a : b, *along = values ? b : a;
      for (int64_t vector = 0; vector < vectors; ++vector) {
        float* y = s.left + vector * length;
        for (int64_t i = 0; i < length; ++i) y[i] -= factor * static_cast<float>(own[vector] * along[i]);
      }
    }
  }

  void write_outliers() const {
    for (int64_t vector = 0; vector < vectors; ++vector) {
      for (int64_t o = 0; o < f.outliers; ++o) {
        int64_t i = s.outliers[vector][o];
        Range at_range = range(vector, i / group);
        float value =
            (s.left[vector * length + i] - to_float(at_range.zero)) / to_float(at_range.scale) - levels / 2;
        BFloat16 rounded;
        from_float(value, &rounded);
        std::memcpy(out + at.outlier_values + 2 * (o * vectors + vector), &rounded, 2);
        out[at.outlier_indices + o * vectors + vector] = static_cast<uint8_t>(i);
      }
    }
  }

  void encode(bool fit) const {
    take_outliers();
    for (int64_t vector = 0; vector < vectors; ++vector) {
      for (int64_t g = 0; g < length / group; ++g) {
        Group from = group_of(s.vectors, vector, g);
        set_range(vector, g, fit ? fitted(from) : min_max(from));
      }
    }
    std::memcpy(s.left, s.vectors, vectors * length * sizeof(float));
    quantise(false);
    for (int round = 0; f.rank && round < (fit ? kRounds : 1); ++round) {
      if (round) quantise(true);
      fit_low_rank();
    }
    pack(s.codes, f, d, values, out + at.codes);
    write_outliers();
  }
};

template <class Storage>
void encode(const GearEncodeParams& p) {
  int64_t d = p.head_dim, key_dim = pyspec::gear_key_dim(p.format, d),
          record = pyspec::gear_record_bytes(p.format, d);
  int64_t value_side = GearSide(p.format, d, false).bytes,
          end = value_side + GearSide(p.format, d, true).bytes;
  auto item = [&](int64_t index) {
    int64_t block = index % p.blocks, h = index / p.blocks % p.kv_heads, b = index / p.blocks / p.kv_heads;
    uint8_t* out = p.quantised + index * record;
    Scratch& s = scratch();
    for (int side = 0; side < 2; ++side) {
      bool values = side == 1;
      const int64_t* strides = values ? p.v_strides : p.k_strides;
      int64_t width = values ? d : key_dim;
      const Storage* from = static_cast<const Storage*>(values ? p.v : p.k) + b * strides[0] + h * strides[1];
      for (int64_t token = 0; token < kBlock; ++token) {
        convert_row(from + (block * kBlock + token) * strides[2], s.x + token * width, width);
      }
      Side(s, p.format, width, values, out + (values ? value_side : 0)).encode(p.fitted);
    }
    int64_t count = p.format.key_channels;
    std::memcpy(out + value_side - count, p.channels + index * count, count);
    std::memset(out + end, 0, record - end);
  };
  pyspec::parallel(p.parallel_for, p.batch * p.kv_heads * p.blocks, item);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_gear_encode)(const GearEncodeParams& p) {
  with_element(p.element, [&](auto element) { encode<decltype(element)>(p); });
}
