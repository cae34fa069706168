// Tiles decoded to float32 rows [channels][32], for runs whose products cannot be taken on codes: rope, rotations that
// mix heads, low rank or outliers on numbers that are not codes, and more queries than a block has.
#pragma once

#include "kv_rows.h"

namespace trimtab {
namespace {

template <class V, int BITS>
void decode_codes(const KvRun& run, int64_t h, int64_t tile, float* rows, KvScratch& scratch) {
  CodeHead<V, BITS> head(run, h, scratch);
  const auto codes = head.tile(tile);
  const int64_t dim = run.head_dim;
  constexpr int kParts = kTile / V::W;
  auto write = [&](int64_t begin, int64_t end, auto scale, auto minimum) TT_INLINE {
    for (int64_t c = begin; c < end; ++c) {
      codes.prefetch(c, kScoreAhead);
      unroll<kParts>([&](auto p) TT_INLINE {
        auto value = codes.template at<p>(c, 0);
        if constexpr (BITS == 8) {
          if (run.levels) {
            float each[V::W];
            V::store(each, value);
            for (float& x : each) x = static_cast<const float*>(run.levels)[int(x)];
            value = V::load(each);
          }
        }
        V::store(rows + c * kTile + p * V::W, V::fma(value, scale(c, p), minimum(c, p)));
      });
    }
  };
  int slots[2] = {0, 0};
  if (head.by_token()) {
    const int64_t first = tile * kTile / run.group_tokens;
    const int64_t second = std::min(tile * kTile + 16, run.tokens - 1) / run.group_tokens;
    slots[1] = first != second;
    head.load_group(first, 0);
    if (slots[1]) head.load_group(second, 1);
    auto channel = [&](const float* parameters) {
      return [&slots, parameters, dim](int64_t c, int p) TT_INLINE {
        return V::set1(parameters[slots[p * V::W / 16] * dim + c]);
      };
    };
    write(0, dim, channel(head.scales), channel(head.minima));
  } else if (head.by_channel()) {
    head.load_channel_groups(tile * kTile, kTile);
    head.each_group([&](int64_t i, int64_t begin, int64_t end) {
      auto token = [&](const float* parameters) {
        return [at = parameters + i * kBlockTokens](int64_t, int p) TT_INLINE { return V::load(at + p * V::W); };
      };
      write(begin, end, token(head.scales), token(head.minima));
    });
  } else {
    auto constant = [](float value) { return [value](int64_t, int) TT_INLINE { return V::set1(value); }; };
    write(0, dim, constant(1.0f), constant(0.0f));
  }
}

// float32 [32 tiles][width] rows of numbers that lie token by token; past the end of the run, and past dim, they are zero.
template <class V>
void decode_tokens(const KvRun& run, int64_t head, int64_t first, int64_t tiles, int64_t width, float* to, KvScratch& scratch) {
  const int64_t dim = run.head_dim, valid = std::min(tiles * kTile, run.tokens - first * kTile);
  const int32_t dtype = run.coupled > 1 ? 1 : run.exact_dtype;
  const uint8_t* rows;
  int64_t step = dim;
  if (run.coupled > 1) {
    scratch.halves.resize(size_t(kRowTiles * kTile * dim));
    decode_coupled(run, head, first, tiles, scratch.halves.data());
    rows = reinterpret_cast<const uint8_t*>(scratch.halves.data());
  } else {
    step = run.exact_token_step;
    rows = static_cast<const uint8_t*>(run.exact) + (head * run.exact_head_step + first * kTile * step) * (dtype ? 2 : 4);
  }
  for (int64_t t = 0; t < valid; ++t) {
    to_floats<V>(dtype, rows + t * step * (dtype ? 2 : 4), dim, to + t * width);
    std::fill(to + t * width + dim, to + (t + 1) * width, 0.0f);
  }
  std::fill(to + valid * width, to + tiles * kTile * width, 0.0f);
}

inline void transpose(const float* from, int64_t rows, int64_t columns, float* to) {
  for (int64_t r = 0; r < rows; ++r) {
    for (int64_t c = 0; c < columns; ++c) to[c * rows + r] = from[r * columns + c];
  }
}

template <class V>
void decode_head(const KvRun& run, int64_t head, int64_t tile, float* rows, KvScratch& scratch) {
  const int64_t dim = run.head_dim;
  if (run.coupled > 1 || run.exact) {
    float* tokens = scratch.head.take(kTile * dim);
    decode_tokens<V>(run, head, tile, 1, dim, tokens, scratch);
    transpose(tokens, kTile, dim, rows);
  } else {
    switch (run.bits) {
      case 1: decode_codes<V, 1>(run, head, tile, rows, scratch); break;
      case 2: decode_codes<V, 2>(run, head, tile, rows, scratch); break;
      case 3: decode_codes<V, 3>(run, head, tile, rows, scratch); break;
      case 4: decode_codes<V, 4>(run, head, tile, rows, scratch); break;
      default: decode_codes<V, 8>(run, head, tile, rows, scratch);
    }
  }
  for (int64_t r = 0; r < run.rank; ++r) {
    float factors[kTile];
    load_tokens<V>(run, run.token_factors, head * run.rank + r, tile * kTile, kTile, 0.0f, factors);
    const uint16_t* channel = static_cast<const uint16_t*>(run.channel_factors) + (head * run.rank + r) * dim;
    for (int64_t c = 0; c < dim; ++c) {
      const auto factor = V::set1(half_to_float(channel[c]));
      for (int t = 0; t < kTile; t += V::W) {
        float* at = rows + c * kTile + t;
        V::store(at, V::fma(V::load(factors + t), factor, V::load(at)));
      }
    }
  }
  if (run.outlier_starts) {
    const Outliers found = outliers_of<V>(run, head, tile, scratch);
    for (int64_t i = 0; i < found.count; ++i) rows[found.places[i]] = found.values[i];
  }
}

// STAGES steps of the Walsh-Hadamard transform of rows [channels][32], those that pair rows `width` apart and more.
// Row i is read at from[order[i]], or from[i].
template <class V, int STAGES>
TT_NOINLINE void transform_stages(const float* from, const int32_t* order, int64_t channels, int64_t width, float norm, float* to) {
  constexpr int kRows = 1 << STAGES;
  const auto factor = V::set1(norm);
  for (int64_t base = 0; base < channels; base += kRows * width) {
    for (int64_t row = base; row < base + width; ++row) {
      const float* places[kRows];
      unroll<kRows>([&](auto i) TT_INLINE {
        const int64_t at = row + i * width;
        places[i] = from + (order ? order[at] : at) * kTile;
      });
      for (int t = 0; t < kTile; t += V::W) {
        typename V::floats x[kRows];
        unroll<kRows>([&](auto i) TT_INLINE { x[i] = V::load(places[i] + t); });
        unroll<STAGES>([&](auto stage) TT_INLINE {
          constexpr int step = 1 << stage;
          unroll<kRows / 2>([&](auto i) TT_INLINE {
            constexpr int a = i / step * 2 * step + i % step, b = a + step;
            const auto sum = V::add(x[a], x[b]);
            x[b] = V::sub(x[a], x[b]);
            x[a] = sum;
          });
        });
        unroll<kRows>([&](auto i) TT_INLINE { V::store(to + (row + i * width) * kTile + t, V::mul(x[i], factor)); });
      }
    }
  }
}

// Rows [channels][32] -> the normalised Walsh-Hadamard transform in blocks of `size` of the rows from[order[i]].
template <class V>
void transform_rows(const float* from, const int32_t* order, int64_t channels, int64_t size, float* to) {
  float norm = 1.0f / __builtin_sqrtf(float(size));
  for (int64_t width = 1; width < size; norm = 1.0f, order = nullptr, from = to) {
    if (V::kSums >= 16 && width * 16 <= size) {
      transform_stages<V, V::kSums >= 16 ? 4 : 1>(from, order, channels, width, norm, to);
      width *= 16;
    } else if (width * 4 <= size) {
      transform_stages<V, 2>(from, order, channels, width, norm, to);
      width *= 4;
    } else {
      transform_stages<V, 1>(from, order, channels, width, norm, to);
      width *= 2;
    }
  }
}

// The same for one vector of channels.
inline void transform_vector(float* x, int64_t channels, int64_t size) {
  for (int64_t width = 1; width < size; width *= 2) {
    for (int64_t base = 0; base < channels; base += 2 * width) {
      for (int64_t i = base; i < base + width; ++i) {
        const float a = x[i], b = x[i + width];
        x[i] = a + b;
        x[i + width] = a - b;
      }
    }
  }
  const float norm = 1.0f / __builtin_sqrtf(float(size));
  for (int64_t i = 0; i < channels; ++i) x[i] *= norm;
}

// Rows [heads * dim][32] of a tile, heads [first, first + heads) of the run: all steps but overrides.
template <class V>
float* decode_tile(const KvItem& item, const KvRun& run, int64_t tile, bool rope) {
  KvScratch& scratch = *item.scratch;
  const int64_t dim = item.dim, channels = item.heads * dim;
  float* rows = scratch.rows.take(channels * kTile);
  for (int64_t h = 0; h < item.heads; ++h) decode_head<V>(run, item.first_head + h, tile, rows + h * dim * kTile, scratch);
  if (run.order || run.hadamard) {
    const uint16_t* order = static_cast<const uint16_t*>(run.order);
    scratch.places.resize(size_t(channels));
    for (int64_t r = 0; r < channels; ++r) scratch.places[order ? order[r] : size_t(r)] = int32_t(r);
    float* rotated = scratch.rotated.take(channels * kTile);
    if (run.hadamard > 1) {
      transform_rows<V>(rows, scratch.places.data(), channels, run.hadamard, rotated);
    } else {
      for (int64_t c = 0; c < channels; ++c) std::memcpy(rotated + c * kTile, rows + scratch.places[c] * kTile, kTile * 4);
    }
    rows = rotated;
  }
  if (!rope || run.first_position < 0) return rows;

  const int64_t half = item.half, valid = std::min<int64_t>(kTile, run.tokens - tile * kTile);
  float *cos = scratch.table.take(2 * half * kTile), *sin = cos + half * kTile;
  for (int64_t t = 0; t < kTile; ++t) {
    const int64_t at = (run.first_position + tile * kTile + std::min(t, valid - 1)) * half;
    for (int64_t j = 0; j < half; ++j) {
      cos[j * kTile + t] = item.cos[at + j];
      sin[j * kTile + t] = item.sin[at + j];
    }
  }
  for (int64_t h = 0; h < item.heads; ++h) {
    float *a = rows + h * dim * kTile, *b = a + half * kTile;
    for (int64_t i = 0; i < half * kTile; i += V::W) {
      const auto x = V::load(a + i), y = V::load(b + i), c = V::load(cos + i), s = V::load(sin + i);
      V::store(a + i, V::sub(V::mul(x, c), V::mul(y, s)));
      V::store(b + i, V::fma(x, s, V::mul(y, c)));
    }
  }
  return rows;
}

}  // namespace
}  // namespace trimtab
