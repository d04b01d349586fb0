// residual_vq on a GPU: query rows of a KV head over a chunk of tokens, by a block of threads.
//
// Nothing is summed before it is multiplied: scores are products over (level, channel), results over (level,
// token), so codewords go to the tensor cores as they are in the codebooks, exact, and only fp32 is summed.
// Queries, and weights times the scales of values, are fp16 with a factor for each row; fp32 rows take a
// second product with what fp16 leaves of them.
//
// Scores: lane t of four reads a quarter of the codewords of two tokens. Results: lane t has a level of four,
// and four tokens' codes; channels in pairs become tokens in pairs by byte permutes.
//
// Keys that were coded before rotary embedding are summed over four levels and turned to their places in the
// record, for queries that were turned back by the record's first position.
#pragma once

#include "cuda/vq_stages.h"

namespace pyspec {
namespace {

template <bool kSplit, int kTiles, int kRuns, bool kSmall, bool kTurned>
struct Fold : VqStages<kSplit, kTiles, kRuns, kSmall, kTurned> {
  using Base = VqStages<kSplit, kTiles, kRuns, kSmall, kTurned>;
  using Base::await, Base::begin, Base::books, Base::buffer, Base::codes, Base::levels, Base::read_codes,
      Base::unit;
  using Base::Base, Base::kBook, Base::kCodes, Base::kParts, Base::kRows, Base::kSlices, Base::kTokens;
  using Base::chunk, Base::first_row, Base::first_token, Base::g, Base::group, Base::lane, Base::most,
      Base::of;
  using Base::p, Base::seen, Base::shared, Base::slice, Base::t, Base::warp;
  using Queries = typename Base::Queries;

  // ==== scores [tokens][rows]: rows g, g + 8 of product i are tokens 8 g + 2 i, 8 g + 2 i + 1 of a run ====

  using Scores = float[kRuns][kRun / 16][kTiles][4];
  static constexpr int kPassRows = kRows < 16 ? kRows : 16;  // that become weights together

  __device__ static void add_products(float (&scores)[kTiles][4], const uint32_t (&keys)[4],
                                      const Queries& query, int pair, int parts = kParts) {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int part = 0; part < kParts; ++part)
        if (part < parts)
          multiply_add(scores[tile], keys, query[part][tile][2 * pair], query[part][tile][2 * pair + 1]);
    }
  }

  __device__ void add_scores(int stage, const Queries& query, Scores& scores) const {
    const uint8_t* book = (kSmall ? buffer(stage) : books(stage)) + 16 * t;
    const uint8_t* slots = codes(stage);
    int count = levels(stage);
#pragma unroll 1
    for (int level = 0; level < count; ++level, book += kBook, slots += kCodes) {
      if (kSmall || level == 0) await(level);
#pragma unroll
      for (int run = 0; run < kRuns; ++run) {
        uint32_t code[8];
        read_codes(slots, run * kRun + 8 * g, code);
#pragma unroll
        for (int i = 0; i < kRun / 16; ++i) {
          uint4 x = *reinterpret_cast<const uint4*>(book + code[2 * i] * kWord),
                y = *reinterpret_cast<const uint4*>(book + code[2 * i + 1] * kWord);
          add_products(scores[run][i], {x.x, y.x, x.y, y.y}, query, 0);
          add_products(scores[run][i], {x.z, y.z, x.w, y.w}, query, 1);
        }
      }
    }
  }

  __device__ void add_turned_scores(int stage, const Queries& query, Scores& scores) const {
    const uint8_t* book = (kSmall ? buffer(stage) : books(stage)) + 8 * t;
    int half = static_cast<int>(p.head_dim) / 2, count = levels(stage);
    constexpr int kOfRun = kRun / 16;
    await(kLevels - 1);
#pragma unroll 1  // else all tokens' cosines would be in registers
    for (int i = 0; i < kTokens / 16; ++i) {
      float sums[kTiles][4] = {};
      uint32_t keys[2][kParts][4];  // of the channels 4 t .. 4 t + 3, and of their partners
#pragma unroll
      for (int which = 0; which < 2; ++which) {
        int token = i / kOfRun * kRun + 8 * g + 2 * (i % kOfRun) + which;
        float x[2][4] = {};
#pragma unroll 2
        for (int level = 0; level < count; ++level) {
          uint32_t code[1];
          read_codes(codes(stage) + level * kCodes, token, code);
          const uint8_t* word = book + level * kBook + code[0] * kWord;
          uint2 first = *reinterpret_cast<const uint2*>(word),
                second = *reinterpret_cast<const uint2*>(word + kWord / 2);
          uint32_t pairs[2][2] = {{first.x, first.y}, {second.x, second.y}};
#pragma unroll
          for (int c = 0; c < 8; ++c) x[c / 4][c % 4] += half_at(pairs[c / 4][c % 4 / 2], c % 2);
        }
        const float* cosines =
            p.rotary + (first_token % kVqBlock + token) * 2 * half + 4 * t * of.groups + group;
#pragma unroll
        for (int c = 0; c < 4; ++c) {
          turn(x[0][c], x[1][c], cosines[c * of.groups], cosines[half + c * of.groups]);
        }
#pragma unroll
        for (int pair = 0; pair < 4; ++pair) {
          uint32_t parts[kParts];
          split<kSplit>(x[pair / 2][pair % 2 * 2], x[pair / 2][pair % 2 * 2 + 1], parts);
#pragma unroll
          for (int part = 0; part < kParts; ++part) keys[pair / 2][part][pair % 2 * 2 + which] = parts[part];
        }
      }
#pragma unroll
      for (int side = 0; side < 2; ++side) {
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          add_products(sums, keys[side][part], query, side, kParts - part);
      }
#pragma unroll
      for (int j = 0; j < kTokens / 16 * kTiles * 4; ++j) {
        int product = j / (kTiles * 4), tile = j / 4 % kTiles;
        if (product == i) scores[product / kOfRun][product % kOfRun][tile][j % 4] += sums[tile][j % 4];
      }
    }
  }

  // Four tokens' scores of a row over a group; rows lie so that lanes of a warp meet no bank twice.
  __device__ float4& partial(int of_group, int row, int four) const {
    float4* rows = reinterpret_cast<float4*>(buffer(of.stages - 1));
    return rows[(of_group * kPassRows + row) * (kChunk / 4) + (four ^ (row / 2 % 2 + row / 4 % 2 * 4))];
  }
  __device__ void write_partial(const Scores& scores, int pass) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
      if (tile / 2 != pass) continue;
#pragma unroll
      for (int i = 0; i < kTokens / 32; ++i) {
        int row = tile % 2 * 8 + 2 * t, four = (first_token + i / 2 * kRun) / 4 + 2 * g + i % 2;
        const float (&x)[4] = scores[i / 2][i % 2 * 2][tile], (&y)[4] = scores[i / 2][i % 2 * 2 + 1][tile];
        partial(group, row, four) = make_float4(x[0], x[2], y[0], y[2]);
        partial(group, row + 1, four) = make_float4(x[1], x[3], y[1], y[3]);
      }
    }
  }

  // ==== scores to weights, by a warp for each row ====

  __device__ uint16_t* weights(int part, int row) const {
    return reinterpret_cast<uint16_t*>(shared + of.queries) + (part * kRows + row) * kWeights;
  }
  // Those of a record's tokens 4 lane .. 4 lane + 3.
  __device__ uint2 scales(int side, int which) const {
    return reinterpret_cast<const uint2*>(shared + of.scales)[(side * kChunkBlocks + which) * 32 + lane];
  }

  // Weights are in units of a power of two that makes the largest product with the scale of a value at most
  // 1, and at least a half: fp16 has room for these, however different the scales are.
  __device__ void weigh(int pass) const {
    for (int in_pass = warp; in_pass < kPassRows; in_pass += blockDim.x / 32) {
      int row = pass * 16 + in_pass;
      float score[kChunkBlocks][4], scale[kChunkBlocks][4], largest = -INFINITY, total = 0.0f;
      int blocks = seen(row) - chunk * kChunkBlocks;
      uint32_t is_seen = 0;  // of the tokens below, a bit each: one register
      for (int which = 0; which < kChunkBlocks && which < blocks; ++which) {
        int before = Base::oldest(row) - chunk * kChunk - which * static_cast<int>(kVqBlock) - 4 * lane;
        is_seen |= (15u << min(max(before, 0), 4) & 15u) << 4 * which;
      }
#pragma unroll
      for (int which = 0; which < kChunkBlocks; ++which) {
        float4 sum = partial(0, in_pass, which * 32 + lane);
        for (int i = 1; i < of.groups; ++i) {
          float4 more = partial(i, in_pass, which * 32 + lane);
          sum.x += more.x, sum.y += more.y, sum.z += more.z, sum.w += more.w;
        }
        float sums[4] = {sum.x, sum.y, sum.z, sum.w},
              factor = unit(kTurned ? which : 0)[row] * (p.scale * kLog2E);
        uint2 keys = scales(0, which), values = scales(1, which);
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float key = half_at(i < 2 ? keys.x : keys.y, i % 2),
                value = half_at(i < 2 ? values.x : values.y, i % 2);
          bool counts = is_seen >> (4 * which + i) & 1;
          score[which][i] = counts ? __fmul_rn(sums[i], __fmul_rn(key, factor)) : -INFINITY;
          scale[which][i] = counts ? value : 0.0f;
          float size = fmaxf(scale[which][i], 0x1p-24f);
          int exponent = static_cast<int>(__float_as_uint(size) >> 23) - 126;
          largest = fmaxf(largest, score[which][i] + static_cast<float>(exponent));
        }
      }
      largest = across_warp<true>(largest);
      float safe = largest == -INFINITY ? 0.0f : largest;
#pragma unroll
      for (int which = 0; which < kChunkBlocks; ++which) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          float weight = exp2f(score[which][i] - safe);
          total += weight;
          score[which][i] = weight * scale[which][i];
        }
        uint32_t first[kParts], second[kParts];
        split<kSplit>(score[which][0], score[which][1], first);
        split<kSplit>(score[which][2], score[which][3], second);
#pragma unroll
        for (int part = 0; part < kParts; ++part)
          reinterpret_cast<uint2*>(weights(part, row))[which * 32 + lane] = {first[part], second[part]};
      }
      total = across_warp<false>(total);
      if (lane == 0 && first_row + row < of.rows) {
        float* state =
            Row(p, blockIdx.y, first_row + row).state(p, blockIdx.z, of.chunks, chunk) + p.head_dim;
        state[0] = largest, state[1] = total;
      }
    }
  }

  // ==== values [channels][rows]: rows g, g + 8 of product i are channels 4 g + 2 i, 4 g + 2 i + 1 ====

  using Values = float[2][kTiles][4];

  // Lane t has level t of four; where there is none, its weights are zero.
  __device__ void add_values(int stage, Values& values) const {
    int count = levels(stage), level = t < count ? t : count - 1;
    const uint8_t* book = kSmall ? buffer(stage) : books(stage);
    uint32_t place = kSmall ? g / 4 * 128 + level * 32 + g % 4 * 8 : level * kBook + g * 8;
    const uint8_t* slot = codes(stage) + level * kCodes;
    await(kLevels - 1);
#pragma unroll 2
    for (int token = 0; token < kTokens; token += 4) {
      uint32_t code[4], word[4][2], channels[2][4];
      if (kSmall) code[0] = *reinterpret_cast<const uint32_t*>(slot + token);
      if (!kSmall) read_codes(slot, token, code);
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        // 256 bytes from one code to the next: the code is the second byte of the address.
        uint32_t at = kSmall ? __byte_perm(code[0], place, 0x5504 | i << 4) : code[i] * kWord + place;
        uint2 piece = *reinterpret_cast<const uint2*>(book + at);
        word[i][0] = piece.x, word[i][1] = piece.y;
      }
#pragma unroll
      for (int i = 0; i < 8; ++i) {  // a channel of two tokens
        const uint32_t (&pair)[2] = word[i % 4 / 2 * 2], (&next)[2] = word[i % 4 / 2 * 2 + 1];
        channels[i / 4][i % 4] = __byte_perm(pair[i / 4], next[i / 4], i % 2 ? 0x7632 : 0x5410);
      }
#pragma unroll
      for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
        for (int part = 0; part < kParts; ++part) {
          const uint16_t* from = weights(part, 8 * tile + g) + first_token + token;
          uint2 weight = *reinterpret_cast<const uint2*>(from);
          if (t >= count) weight = {0, 0};
          multiply_add(values[0][tile], channels[0], weight.x, weight.y);
          multiply_add(values[1][tile], channels[1], weight.x, weight.y);
        }
      }
    }
  }

  __device__ float* result(int of_slice, int row) const {
    return reinterpret_cast<float*>(shared) + (of_slice * kRows + row) * (p.head_dim + 4);
  }
  __device__ void write_values(const Values& values) const {
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        float* to = result(slice, 8 * tile + 2 * t + i) + group * kVqWidth + 4 * g;
        const float (&x)[4] = values[0][tile], (&y)[4] = values[1][tile];
        *reinterpret_cast<float4*>(to) = make_float4(x[i], x[2 + i], y[i], y[2 + i]);
      }
    }
    __syncthreads();
    for (int row = warp; row < kRows && first_row + row < of.rows; row += blockDim.x / 32) {
      float* state = Row(p, blockIdx.y, first_row + row).state(p, blockIdx.z, of.chunks, chunk);
      for (int c = lane; c < p.head_dim; c += 32) {
        float sum = 0.0f;
        for (int i = 0; i < kSlices; ++i) sum += result(i, row)[c];
        state[c] = sum;
      }
    }
  }

  __device__ void run() const {
    if (!Base::is_seen()) return;
    begin(0);
    if (of.buffers == 2) begin(1);
    Scores scores = {};
    Queries query;
    Base::lay_out_queries();
    __syncthreads();
    Base::read_queries(query);
    for (int stage = 0; stage < of.stages; ++stage) {
      kTurned ? add_turned_scores(stage, query, scores) : add_scores(stage, query, scores);
      __syncthreads();
      if (stage + 1 < of.stages) begin(stage + of.buffers);
    }
#pragma unroll
    for (int pass = 0; pass < kRows / kPassRows; ++pass) {
      write_partial(scores, pass);
      __syncthreads();
      weigh(pass);
      __syncthreads();
    }
    begin(of.stages - 1 + of.buffers);
    Values values = {};
    for (int stage = of.stages; stage < 2 * of.stages; ++stage) {
      add_values(stage, values);
      __syncthreads();
      begin(stage + of.buffers);
    }
    write_values(values);
  }
};

}  // namespace
}  // namespace pyspec
