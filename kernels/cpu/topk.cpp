// topk on the CPU: one pass over a row leaves candidates, from which the k best are cut.
//
// Exact: whatever is not below a bound is appended to a list. When the list is full it is cut down to its k
// best, and the k-th of them is the new bound, so that soon nearly all of the row is compared and left.
// Buckets, interleaved: bucket i is lane i % 16 of every vector at column i / 16, so a step over the row is a
// compare and a blend for each place of the queues, which stay in registers, without a branch or a shuffle.
// Queues start with the first values of their bucket, so they need no value that stands for none.
//
// A thread takes whole rows, or segments of a row which a second loop joins; both give the same result.
#include "params/topk.h"

#include "cpu/topk_lists.h"

namespace {

using pyspec::keeps_all;
using pyspec::TopkParams;

constexpr int64_t kFewestListed = 64;  // beside 4 k: a shorter list would be cut all the time
constexpr int64_t kFewSorted = 64;

// ==== one row ====

template <class Storage>
struct Row {
  const TopkParams& p;
  const Storage* x;
  int32_t flip;     // bits that turn values so that the largest are best
  int32_t nan_key;  // NaN is the largest

  Row(const TopkParams& p, int64_t row)
      : p(p),
        x(static_cast<const Storage*>(p.x) + row * p.stride),
        flip(p.largest ? 0 : static_cast<int32_t>(0x80000000u)),
        nan_key(p.largest ? kHighest : -kHighest) {}

  PYSPEC_INLINE F16 load_turned(const Storage* from) const {
    return bit_xor(load_as_float(from), set1_bits(flip));
  }

  // The same where the row may end: lanes behind it are worst of all.
  PYSPEC_INLINE F16 load_last(int64_t at) const {
    if (at + 16 <= p.n) return load_turned(x + at);
    Storage block[16];
    float worst = p.largest ? -kInfinity : kInfinity;
    for (int64_t i = 0; i < 16; ++i) from_float(worst, block + i);
    if (at < p.n) std::memcpy(block, x + at, (p.n - at) * sizeof(Storage));
    return load_turned(block);
  }

  // Bits of turned floats to keys.
  void to_keys(int32_t* keys, int64_t count) const {
    int32_t nan = nan_key;
    for (int64_t i = 0; i < count; ++i) keys[i] = order_key(keys[i], nan);
  }

  PYSPEC_INLINE int32_t key_of(int64_t i) const {
    float number = to_float(x[i]);
    int32_t bits;
    std::memcpy(&bits, &number, 4);
    return order_key(bits ^ flip, nan_key);
  }

  // ==== exact ====

  PYSPEC_INLINE static void append_lanes(List& list, uint32_t lanes, F16 values, int64_t first) {
#if PYSPEC_HAS_AVX512
    const __m512i counted = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    __m512i index = _mm512_add_epi32(_mm512_set1_epi32(static_cast<int32_t>(first)), counted);
    append(list, lanes, _mm512_castps_si512(values.v), index);
#elif PYSPEC_HAS_X86_VECTORS
    __m256i index = _mm256_add_epi32(_mm256_set1_epi32(static_cast<int32_t>(first)),
                                     _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7));
    append(list, lanes & 255, _mm256_castps_si256(values.lo), index);
    index = _mm256_add_epi32(index, _mm256_set1_epi32(8));
    append(list, lanes >> 8, _mm256_castps_si256(values.hi), index);
#else
    int32_t bits[16];
    store(bits, values);
    for (; lanes; lanes &= lanes - 1, ++list.count) {
      int lane = __builtin_ctz(lanes);
      list.keys[list.count] = bits[lane], list.index[list.count] = static_cast<int32_t>(first + lane);
    }
#endif
  }

  // The k best of values [first, last), in the order of their indices; fewer if there are fewer.
  void collect(int64_t first, int64_t last, Room& room) const {
    List& list = room.list;
    int64_t most = listed(), with_keys = 0;
    float bound = -kInfinity;
    auto cut_down = [&] {
      to_keys(list.keys + with_keys, list.count - with_keys);
      if (list.count > p.k) {
        Cut cut = cut_of(list, p.k, room.spare);
        keep(list, cut);
        bound = number_of(int64_t{cut.above} + (cut.last < 0 ? 2 : 1));  // later equals are not better
      }
      with_keys = list.count;
    };
    list.count = 0;
    int64_t i = first;
    for (; i + kBlock <= last; i += kBlock) {
      F16 values[kVectors], least = set1(bound);
      uint32_t lanes[kVectors], any = 0;
      for (int v = 0; v < kVectors; ++v) {
        values[v] = load_turned(x + i + 16 * v);
        lanes[v] = ~less_mask(values[v], least) & 0xffffu;  // with NaN
        any |= lanes[v];
      }
      if (any == 0) continue;
      for (int v = 0; v < kVectors; ++v) {
        if (lanes[v]) append_lanes(list, lanes[v], values[v], i + 16 * v);
      }
      if (list.count > most) cut_down();
    }
    for (; i < last; i += 16) {
      F16 values = load_last(i);
      uint32_t lanes = ~less_mask(values, set1(bound)) & 0xffffu;
      if (last - i < 16) lanes &= (1u << (last - i)) - 1;
      append_lanes(list, lanes, values, i);
    }
    cut_down();
  }

  // Length at which a list is cut.
  int64_t listed() const {
    int64_t most = 4 * p.k + kFewestListed;
    return most < p.n ? most : p.n;
  }

  // ==== buckets ====

  // Steps over the row in which every bucket gets one value; one more may get some.
  int64_t full_steps() const { return p.n / p.buckets; }
  int64_t steps() const { return (p.n + p.buckets - 1) / p.buckets; }

  template <int kDepth>
  PYSPEC_INLINE static void insert(F16 (&queue)[kDepth], F16 (&when)[kDepth], F16 value, F16 step) {
    for (int j = kDepth - 1; j > 0; --j) {
      F16 newcomer = where_less(queue[j - 1], value, when[j - 1], step);
      when[j] = where_less(queue[j], value, newcomer, when[j]);
      queue[j] = max(queue[j], min(value, queue[j - 1]));
    }
    when[0] = where_less(queue[0], value, step, when[0]);
    queue[0] = max(queue[0], value);
  }

  // Queues of the kWidth vectors of buckets at a column, over steps [first, last). False if there may be NaN.
  template <int kDepth, int kWidth>
  bool fill_strip(int64_t column, int64_t first, int64_t last, List& list) const {
    F16 queue[kWidth][kDepth], when[kWidth][kDepth], sum[kWidth];
    for (int j = 0; j < kDepth; ++j) {
      F16 step = set1_bits(static_cast<int32_t>(first + j));
      for (int w = 0; w < kWidth; ++w) {
        F16 value = load_last((first + j) * p.buckets + column + 16 * w);
        sum[w] = j ? add(sum[w], value) : value;
        queue[w][j] = value, when[w][j] = step;
        for (int i = j; i > 0; --i) {  // before all that it is better than
          F16 above = queue[w][i - 1], below = queue[w][i], above_when = when[w][i - 1];
          when[w][i - 1] = where_less(above, below, when[w][i], above_when);
          when[w][i] = where_less(above, below, above_when, when[w][i]);
          queue[w][i - 1] = max(above, below), queue[w][i] = min(above, below);
        }
      }
    }
    int64_t inside = (p.n - column - 16 * kWidth) / p.buckets + 1;  // steps that end in the row
    if (p.n < column + 16 * kWidth) inside = 0;
    int64_t step = first + kDepth, last_inside = inside < last ? inside : last;
    const Storage* from = x + step * p.buckets + column;
    for (; step < last_inside; ++step, from += p.buckets) {
      F16 now = set1_bits(static_cast<int32_t>(step));
      for (int w = 0; w < kWidth; ++w) {
        F16 value = load_turned(from + 16 * w);
        sum[w] = add(sum[w], value);
        insert(queue[w], when[w], value, now);
      }
    }
    for (; step < last; ++step) {
      F16 now = set1_bits(static_cast<int32_t>(step));
      for (int w = 0; w < kWidth; ++w) {
        F16 value = load_last(step * p.buckets + column + 16 * w);
        sum[w] = add(sum[w], value);
        insert(queue[w], when[w], value, now);
      }
    }
    bool is_clean = true;
    for (int w = 0; w < kWidth; ++w) {
      is_clean &= all_equal(sum[w], sum[w]);
      int64_t at = column + 16 * w, lanes = p.buckets - at < 16 ? p.buckets - at : 16;
      for (int j = 0; j < kDepth; ++j) {
        int32_t bits[16], taken[16];
        store(bits, queue[w][j]), store(taken, when[w][j]);
        for (int64_t i = 0; i < lanes; ++i) {
          list.keys[j * p.buckets + at + i] = bits[i];
          list.index[j * p.buckets + at + i] = static_cast<int32_t>(taken[i] * p.buckets + at + i);
        }
      }
    }
    return is_clean;
  }

  template <int kDepth, int kWidth>
  bool fill_columns(int64_t column, int64_t first, int64_t last, List& list) const {
    for (; column + 16 * (kWidth - 1) < p.buckets; column += 16 * kWidth) {
      if (!fill_strip<kDepth, kWidth>(column, first, last, list)) return false;
    }
    if constexpr (kWidth > 1) return fill_columns<kDepth, kWidth / 2>(column, first, last, list);
    return true;
  }

  template <int kDepth>
  bool fill_queues(int64_t first, int64_t last, List& list) const {
    constexpr int kWidth = kVectorRegisters == 32 ? (kDepth < 3 ? 4 : 2) : kDepth == 1 ? 2 : 1;
    return fill_columns<kDepth, kWidth>(0, first, last, list);
  }

  bool fill_queues(int64_t first, int64_t last, List& list) const {
    switch (p.per_bucket) {
      case 1:
        return fill_queues<1>(first, last, list);
      case 2:
        return fill_queues<2>(first, last, list);
      case 3:
        return fill_queues<3>(first, last, list);
      default:
        return fill_queues<4>(first, last, list);
    }
  }

  // One value into the queue of a bucket, of places [per_bucket, buckets]; index -1 where there is none yet.
  PYSPEC_INLINE void insert_key(List& list, int64_t bucket, int32_t key, int32_t index) const {
    int64_t place = (p.per_bucket - 1) * p.buckets + bucket;
    if (list.index[place] >= 0 && key <= list.keys[place]) return;
    for (; place >= p.buckets; place -= p.buckets) {
      int64_t before = place - p.buckets;
      if (list.index[before] >= 0 && key <= list.keys[before]) break;
      list.keys[place] = list.keys[before], list.index[place] = list.index[before];
    }
    list.keys[place] = key, list.index[place] = index;
  }

  // The same value by value: for contiguous buckets and rows with NaN.
  void fill_slowly(int64_t first, int64_t last, List& list) const {
    for (int64_t i = 0; i < p.buckets * p.per_bucket; ++i) list.index[i] = -1;
    int64_t bucket = 0, larger = p.n % p.buckets, left = full_steps() + (larger > 0);
    for (int64_t i = first; i < last; ++i) {
      insert_key(list, bucket, key_of(i), static_cast<int32_t>(i));
      if (p.interleaved) {
        if (++bucket == p.buckets) bucket = 0;
      } else if (--left == 0) {
        left = full_steps() + (++bucket < larger);
      }
    }
  }

  // What the buckets keep of segment s, in places [per_bucket, buckets].
  void fill(int64_t s, List& list) const {
    int64_t first = full_steps() * s / p.segments;
    int64_t last = s + 1 == p.segments ? steps() : full_steps() * (s + 1) / p.segments;
    list.count = p.buckets * p.per_bucket;
    if (p.interleaved && fill_queues(first, last, list)) return to_keys(list.keys, list.count);
    int64_t end = last * p.buckets < p.n ? last * p.buckets : p.n;
    fill_slowly(p.interleaved ? first * p.buckets : 0, p.interleaved ? end : p.n, list);
  }

  // ==== segments ====

  void take_segment(int64_t s, Room& room) const {
    if (keeps_all(p))
      collect(p.n * s / p.segments, p.n * (s + 1) / p.segments, room);
    else
      fill(s, room.list);
  }

  // Goes on with what a later segment kept.
  void join(List& list, const List& later) const {
    if (keeps_all(p)) {
      std::memcpy(list.keys + list.count, later.keys, later.count * 4);
      std::memcpy(list.index + list.count, later.index, later.count * 4);
      list.count += later.count;
      return;
    }
    for (int64_t first = 0; first < list.count; first += p.buckets) {
      for (int64_t bucket = 0; bucket < p.buckets; ++bucket)
        insert_key(list, bucket, later.keys[first + bucket], later.index[first + bucket]);
    }
  }

  // Cuts what was kept to the k best and writes them.
  void finish(int64_t row, Room& room) const {
    List& list = room.list;
    if (list.count > p.k) keep(list, cut_of(list, p.k, room.spare));
    if (p.sorted) sort(list, room.items);
    int64_t* indices = p.indices + row * p.k;
    Storage* values = static_cast<Storage*>(p.values) + row * p.k;
    for (int64_t i = 0; i < p.k; ++i) indices[i] = list.index[i], values[i] = x[list.index[i]];
  }

  // Best first, of equals the lower index: as integers of 64 bits in ascending order, byte after byte.
  static void sort(List& list, uint64_t* items) {
    int64_t count = list.count;
    uint64_t* other = items + count;
    for (int64_t i = 0; i < count; ++i)
      items[i] = uint64_t{0x7fffffffu - static_cast<uint32_t>(list.keys[i])} << 32 |
                 static_cast<uint32_t>(list.index[i]);
    if (count <= kFewSorted) {
      for (int64_t i = 1; i < count; ++i) {
        uint64_t item = items[i];
        int64_t place = i;
        for (; place > 0 && items[place - 1] > item; --place) items[place] = items[place - 1];
        items[place] = item;
      }
    } else {
      for (int shift = 0; shift < 64; shift += 8) {
        int64_t starts[257] = {};
        for (int64_t i = 0; i < count; ++i) ++starts[(items[i] >> shift & 255) + 1];
        if (starts[(items[0] >> shift & 255) + 1] == count) continue;
        for (int digit = 0; digit < 256; ++digit) starts[digit + 1] += starts[digit];
        for (int64_t i = 0; i < count; ++i) other[starts[items[i] >> shift & 255]++] = items[i];
        uint64_t* sorted = other;
        other = items, items = sorted;
      }
    }
    for (int64_t i = 0; i < count; ++i) list.index[i] = static_cast<int32_t>(items[i]);
  }
};

// ==== all rows ====

// A segment's part of the workspace: keys, then indices.
List part_of(const TopkParams& p, int64_t part) {
  int64_t room = pyspec::segment_candidates(p);
  int64_t* counts = static_cast<int64_t*>(p.workspace);
  int32_t* keys = reinterpret_cast<int32_t*>(counts + p.rows * p.segments) + part * 2 * room;
  return {keys, keys + room, counts[part]};
}

template <class Storage>
void topk(const TopkParams& p) {
  int64_t candidates = pyspec::segment_candidates(p);
  auto room = [&] {
    int64_t listed = p.rows ? Row<Storage>(p, 0).listed() : 0, joined = candidates * p.segments;
    return room_of(keeps_all(p) ? (listed > joined ? listed : joined) : candidates, p.k);
  };
  if (p.segments == 1) {
    int64_t rows_per_item = p.n < pyspec::kWorthAThread ? pyspec::kWorthAThread / p.n : 1;
    auto item = [&](int64_t index) {
      int64_t end = (index + 1) * rows_per_item;
      for (int64_t row = index * rows_per_item; row < p.rows && row < end; ++row) {
        Room own = room();
        Row<Storage> values(p, row);
        values.take_segment(0, own);
        values.finish(row, own);
      }
    };
    pyspec::parallel(p.parallel_for, (p.rows + rows_per_item - 1) / rows_per_item, item);
    return;
  }
  auto segment = [&](int64_t part) {
    Room own = room();
    Row<Storage>(p, part / p.segments).take_segment(part % p.segments, own);
    static_cast<int64_t*>(p.workspace)[part] = own.list.count;
    List kept = part_of(p, part);
    std::memcpy(kept.keys, own.list.keys, kept.count * 4);
    std::memcpy(kept.index, own.list.index, kept.count * 4);
  };
  pyspec::parallel(p.parallel_for, p.rows * p.segments, segment);
  auto row = [&](int64_t index) {
    Room own = room();
    Row<Storage> values(p, index);
    List first = part_of(p, index * p.segments);
    std::memcpy(own.list.keys, first.keys, first.count * 4);
    std::memcpy(own.list.index, first.index, first.count * 4);
    own.list.count = first.count;
    for (int64_t s = 1; s < p.segments; ++s) values.join(own.list, part_of(p, index * p.segments + s));
    values.finish(index, own);
  };
  pyspec::parallel(p.parallel_for, p.rows, row);
}

}  // namespace

extern "C" void PYSPEC_ENTRY(pyspec_topk)(const TopkParams& p) {
  with_element(p.element, [&](auto element) { topk<decltype(element)>(p); });
}
