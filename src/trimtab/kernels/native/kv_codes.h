// One head of a run of codes: its rows, scales, factors and outliers.
#pragma once

#include <algorithm>
#include <cstring>

#include "kv_products.h"

namespace trimtab {
namespace {

inline int64_t tiles_of(const KvRun& run) { return (run.tokens + kTile - 1) / kTile; }

// n float16 numbers, or `absent` if there are none.
template <class V>
TT_NOINLINE void load_halves(const void* from, int64_t at, int64_t n, float absent, float* to) {
  if (!from) {
    std::fill(to, to + n, absent);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from) + at;
  int64_t i = 0;
  for (; i + V::W <= n; i += V::W) V::store(to + i, V::load_half(p + i));
  for (; i < n; ++i) to[i] = half_to_float(p[i]);
}

// The same for `n` tokens from token `first`, of which those past the end of the run are zero, whatever is stored there.
template <class V>
TT_NOINLINE void load_tokens(const KvRun& run, const void* from, int64_t row, int64_t first, int64_t n, float absent, float* to) {
  const int64_t valid = std::min(n, run.tokens - first), at = row * kTile * tiles_of(run) + first;
  for (int64_t i = 0; from && i < n; i += 32) V::prefetch(static_cast<const uint16_t*>(from) + at + n + i);
  load_halves<V>(from, at, valid, absent, to);
  std::fill(to + valid, to + n, 0.0f);
}

template <int BITS>
inline uint32_t code_at(const uint8_t* row, uint32_t token) {
  auto word = [&](uint32_t i) {
    uint32_t value;
    std::memcpy(&value, row + 4 * i, 4);
    return value;
  };
  if constexpr (BITS == 3) {
    return (word(token % 2) >> (token & ~1u) & 3) | (word(2) >> token & 1) << 2;
  } else {
    return word(token % BITS) >> (token / BITS * BITS) & ((1u << BITS) - 1);
  }
}

// Those of one tile; a place is channel * 32 + token in the tile.
struct Outliers {
  const uint16_t* places;
  const float* values;
  int64_t count;
};

template <class V>
TT_NOINLINE Outliers outliers_of(const KvRun& run, int64_t head, int64_t tile, KvScratch& scratch) {
  const int32_t* starts = static_cast<const int32_t*>(run.outlier_starts) + head * tiles_of(run) + tile;
  const int64_t count = starts[1] - starts[0];
  const uint16_t* from = static_cast<const uint16_t*>(run.outlier_values) + starts[0];
  float* values = scratch.outliers.take(count + V::W);
  if (run.outlier_dtype == 1) {
    for (int64_t i = 0; i < count; i += V::W) {
      V::store(values + i, count - i < V::W ? V::load_half(from + i, count - i) : V::load_half(from + i));
    }
  } else {
    for (int64_t i = 0; i < count; ++i) values[i] = bfloat16_to_float(from[i]);
  }
  return {static_cast<const uint16_t*>(run.outlier_places) + starts[0], values, count};
}

// Whether a unit multiplies such codes as whole numbers.
template <class V, int BITS>
constexpr bool takes_whole_numbers() {
  return V::kWholeNumbers && (BITS == 2 || BITS == 4);
}

// One head of a run of codes, with what is shared by all its tiles.
template <class V, int BITS>
struct CodeHead {
  const KvRun& run;
  int64_t head, dim;
  CodeRows<V, BITS> rows;
  float levels[1 << (BITS == 8 ? 0 : BITS)];
  // Scale and minimum: [dim] of up to 2 token groups of a tile, or [channel groups][kBlockTokens].
  float *scales, *minima;
  float *token_factors, *channel_factors;  // [rank][kBlockTokens], [rank][dim]
  int64_t group_of_slot[2] = {-1, -1};

  TT_NOINLINE CodeHead(const KvRun& r, int64_t h, KvScratch& scratch) : run(r), head(h), dim(r.head_dim) {
    const int64_t parameters = std::max(2 * kValueTiles * dim, channel_groups() * kBlockTokens);
    scales = scratch.head.take(2 * parameters + run.rank * (kBlockTokens + dim));
    minima = scales + parameters;
    token_factors = minima + parameters;
    channel_factors = token_factors + run.rank * kBlockTokens;
    const int64_t tile_bytes = dim * 4 * BITS;
    const uint8_t* codes = static_cast<const uint8_t*>(run.codes) + head * tiles_of(run) * tile_bytes;
    const float* table = static_cast<const float*>(run.levels);
    rows = {codes, tile_bytes, V::table(table, BITS)};
    if constexpr (BITS < 8) {
      for (int i = 0; i < 1 << BITS; ++i) levels[i] = table ? table[i] : float(i);
    }
    load_halves<V>(run.channel_factors, head * run.rank * dim, run.rank * dim, 0.0f, channel_factors);
  }

  bool scaled() const { return run.scale || run.minimum; }
  bool by_token() const { return scaled() && run.group_tokens; }
  bool by_channel() const { return scaled() && run.group_channels; }
  int64_t group(int64_t c) const { return (head * dim + c) / run.group_channels; }
  int64_t channel_groups() const { return by_channel() ? group(dim - 1) - group(0) + 1 : 1; }
  // Whether groups of channels are whole registers of code bytes, and codes are their own levels.
  template <int CHANNELS>
  bool whole_registers() const {
    return !run.levels && dim % CHANNELS == 0 && (!by_channel() || run.group_channels % CHANNELS == 0);
  }
  // f(group counted from the head's first, its first channel in this head, the end)
  template <class F>
  TT_INLINE void each_group(F&& f) const {
    if (!by_channel()) return f(0, 0, dim);
    const int64_t first = group(0);
    for (int64_t i = 0, c = 0; c < dim; ++i) {
      const int64_t end = std::min(dim, (first + i + 1) * run.group_channels - head * dim);
      f(i, c, end);
      c = end;
    }
  }
  CodeRows<V, BITS> tile(int64_t t) const {
    return {rows.tiles + t * rows.tile_bytes, rows.tile_bytes, rows.table};
  }
  TT_NOINLINE void load_group(int64_t g, int slot) {  // of tokens
    const int64_t at = (head * ((run.tokens + run.group_tokens - 1) / run.group_tokens) + g) * dim;
    load_halves<V>(run.scale, at, dim, 1.0f, scales + slot * dim);
    load_halves<V>(run.minimum, at, dim, 0.0f, minima + slot * dim);
  }
  TT_NOINLINE void load_channel_groups(int64_t first_token, int64_t tokens) {
    each_group([&](int64_t i, int64_t, int64_t) {
      load_tokens<V>(run, run.scale, group(0) + i, first_token, tokens, 1.0f, scales + i * kBlockTokens);
      load_tokens<V>(run, run.minimum, group(0) + i, first_token, tokens, 0.0f, minima + i * kBlockTokens);
    });
  }
  TT_NOINLINE void load_token_factors(int64_t first_token, int64_t tokens) {
    for (int64_t r = 0; r < run.rank; ++r) {
      load_tokens<V>(run, run.token_factors, head * run.rank + r, first_token, tokens, 0.0f,
                     token_factors + r * kBlockTokens);
    }
  }
  // The outliers of tile `first + t` less what codes and low rank say there; `first` is the first of the tiles that are
  // loaded. slots[h]: whose scales [dim] the 16 tokens h of the tile have.
  TT_NOINLINE Outliers corrections(int64_t first, int64_t t, const int* slots, KvScratch& scratch) const {
    const Outliers found = outliers_of<V>(run, head, first + t, scratch);
    float* values = const_cast<float*>(found.values);
    const uint8_t* codes = rows.tiles + (first + t) * rows.tile_bytes;
    auto subtract = [&](auto&& scaled) TT_INLINE {
      for (int64_t i = 0; i < found.count; ++i) {
        const uint32_t c = found.places[i] / kTile, token = found.places[i] % kTile;
        const uint32_t code = code_at<BITS>(codes + c * 4 * BITS, token);
        values[i] -= scaled(BITS == 8 ? float(int32_t(code)) : levels[BITS == 8 ? 0 : code], c, token);
      }
    };
    if (by_token()) {
      const float *s[] = {scales + slots[0] * dim, scales + slots[1] * dim};
      const float *m[] = {minima + slots[0] * dim, minima + slots[1] * dim};
      subtract([&](float level, uint32_t c, uint32_t token) TT_INLINE { return level * s[token / 16][c] + m[token / 16][c]; });
    } else if (by_channel()) {
      const uint32_t size = uint32_t(run.group_channels), start = uint32_t(head * dim % run.group_channels);
      const uint64_t inverse = (uint64_t(1) << 32) / size + 1;  // exact for the at most 2^16 channels of a run
      const float *s = scales + t * kTile, *m = minima + t * kTile;
      subtract([&](float level, uint32_t c, uint32_t token) TT_INLINE {
        const uint64_t at = ((c + start) * inverse >> 32) * kBlockTokens + token;
        return level * s[at] + m[at];
      });
    } else {
      subtract([](float level, uint32_t, uint32_t) TT_INLINE { return level; });
    }
    const float* factors = token_factors + t * kTile;
    auto subtract_low_rank = [&](auto rank) TT_INLINE {
      for (int64_t i = 0; i < found.count; ++i) {
        const uint32_t c = found.places[i] / kTile, token = found.places[i] % kTile;
        float sum = 0;
        for (int64_t r = 0; r < rank; ++r) sum += factors[r * kBlockTokens + token] * channel_factors[r * dim + c];
        values[i] -= sum;
      }
    };
    if (run.rank == 4) subtract_low_rank(std::integral_constant<int, 4>{});
    else if (run.rank) subtract_low_rank(run.rank);
    return found;
  }
};

}  // namespace
}  // namespace trimtab
