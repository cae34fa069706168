// The table of kernels of one vector unit: which way the keys or values of a run are multiplied.
#pragma once

#include "kv_code_products.h"
#include "kv_dense.h"
#include "kv_softmax.h"

namespace trimtab {
namespace {

// f(number of bits) as a constant.
template <class F>
TT_INLINE inline void with_bits(int32_t bits, F&& f) {
  switch (bits) {
    case 1: return f(std::integral_constant<int, 1>{});
    case 2: return f(std::integral_constant<int, 2>{});
    case 3: return f(std::integral_constant<int, 3>{});
    case 4: return f(std::integral_constant<int, 4>{});
    default: return f(std::integral_constant<int, 8>{});
  }
}

// Numbers token by token, and nothing to add before rope.
inline bool is_rows(const KvRun& run) {
  return (run.exact || run.coupled > 1) && !run.rank && !run.outlier_starts && !run.hadamard && !run.order;
}

template <class V>
bool is_codes(const KvItem& item, const KvRun& run) {
  return !run.exact && run.coupled == 1 && run.first_position < 0 && !mixes_heads(run) &&
         !(run.bits == 8 && run.levels) && item.count <= V::kQueries;
}

// f(reader, tokens, place of the first in [begin, end)): the rows of a head in pieces, and their format and width.
template <class V>
struct Rows {
  bool direct;  // read where they are
  int format;
  int64_t width;

  Rows(const KvItem& item, const KvRun& run)
      : direct(run.exact && run.first_position < 0 && item.dim % V::W == 0),
        format(direct ? row_format<V>(run.exact_dtype, item.dim) : int(kRowFloat)),
        width((item.dim + V::W - 1) / V::W * V::W) {}

  template <class F>
  void each(const KvItem& item, const KvRun& run, int64_t head, int64_t begin, int64_t end, F&& f) const {
    if (direct) {
      const int64_t bytes = run.exact_dtype ? 2 : 4, piece = item.count > V::kQueries ? 128 : end - begin;
      const uint8_t* rows = static_cast<const uint8_t*>(run.exact) + head * run.exact_head_step * bytes;
      for (int64_t t = begin; t < end; t += piece) {
        f(rows + t * run.exact_token_step * bytes, run.exact_token_step * bytes, std::min(piece, end - t), t - begin);
      }
      return;
    }
    for (int64_t tile = begin / kTile; tile * kTile < end; tile += kRowTiles) {
      const int64_t first = tile * kTile, tiles = std::min(kRowTiles, (end + kTile - 1) / kTile - tile);
      float* rows = item.scratch->rows.take(tiles * kTile * width);
      decode_tokens<V>(run, head, tile, tiles, width, rows, *item.scratch);
      const int64_t from = std::max(begin, first), to = std::min(end, first + tiles * kTile);
      for (int64_t t = from; run.first_position >= 0 && t < to; ++t) {
        const int64_t position = (run.first_position + t) * item.half;
        rotate_row(rows + (t - first) * width, item.cos + position, item.sin + position, item.half);
      }
      f(rows + (from - first) * width, width * 4, to - from, from - begin);
    }
  }
};

template <class V>
void row_keys(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  const Rows<V> rows(item, run);
  for (int64_t h = 0; h < item.heads; ++h) {
    float* queries = item.scratch->queries.take(item.count * rows.width);
    to_row_order<V>(rows.format, item.queries + h * item.count * item.dim, item.count, item.dim, rows.width, queries);
    float* scores = item.scores + h * item.count * item.pitch + at;
    rows.each(item, run, item.first_head + h, begin, end, [&](const void* from, int64_t step, int64_t n, int64_t place) {
      with_reader<V>(rows.format, from, step, [&](auto reader) {
        each_block<V>(item.count, [&](auto q, int64_t first) {
          score_rows<V, q>(reader, n, rows.width / V::W, queries + first * rows.width,
                           scores + first * item.pitch + place, item.pitch);
        });
      });
    });
  }
}

template <class V>
void row_values(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  const Rows<V> rows(item, run);
  for (int64_t h = 0; h < item.heads; ++h) {
    float* sums = item.scratch->queries.take(item.count * rows.width);
    std::fill(sums, sums + item.count * rows.width, 0.0f);
    const float* weights = item.scores + h * item.count * item.pitch + at;
    rows.each(item, run, item.first_head + h, begin, end, [&](const void* from, int64_t step, int64_t n, int64_t place) {
      with_reader<V>(rows.format, from, step, [&](auto reader) {
        each_block<V>(item.count, [&](auto q, int64_t first) {
          sum_rows<V, q>(reader, n, rows.width / V::W, weights + first * item.pitch + place, item.pitch,
                         sums + first * rows.width);
        });
      });
    });
    add_row_order<V>(rows.format, sums, item.count, item.dim, rows.width, item.sums + h * item.count * item.dim);
  }
}

template <class V>
void code_keys(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  const int64_t size = item.count * item.dim;
  for (int64_t h = 0; h < item.heads; ++h) {
    const float* queries = item.queries + h * size;
    if (run.hadamard) {  // of the query, for the transform is symmetric
      float* rotated = item.scratch->queries.take(size);
      std::memcpy(rotated, queries, size_t(size) * 4);
      transform_vector(rotated, size, run.hadamard);
      queries = rotated;
    }
    float* scores = item.scores + h * item.count * item.pitch + at;
    with_bits(run.bits, [&](auto bits) {
      each_block<V>(item.count, [&](auto q, int64_t first) {
        score_codes<V, bits, q>(run, item.first_head + h, begin, end, queries + first * item.dim,
                                scores + first * item.pitch, item.pitch, *item.scratch);
      });
    });
  }
}

template <class V>
void code_values(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  const int64_t size = item.count * item.dim;
  for (int64_t h = 0; h < item.heads; ++h) {
    float *lanes = item.lanes + h * size * V::W, *sums = item.sums + h * size;
    if (run.hadamard) {  // of what this run adds
      sums = item.scratch->queries.take(size * (1 + V::W));
      lanes = sums + (size + 15) / 16 * 16;
      std::fill(sums, sums + size * (1 + V::W), 0.0f);
    }
    with_bits(run.bits, [&](auto bits) {
      each_block<V>(item.count, [&](auto q, int64_t first) {
        const int64_t offset = first * item.dim;
        sum_codes<V, bits, q>(run, item.first_head + h, begin, end,
                              item.scores + (h * item.count + first) * item.pitch + at, item.pitch,
                              lanes + offset * V::W, sums + offset, *item.scratch);
        if (run.hadamard) add_lanes<V, q>(lanes + offset * V::W, item.dim, sums + offset);
      });
    });
    if (!run.hadamard) continue;
    transform_vector(sums, size, run.hadamard);
    for (int64_t i = 0; i < size; ++i) item.sums[h * size + i] += sums[i];
  }
}

template <class V>
void dense_keys(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  for (int64_t tile = begin / kTile; tile * kTile < end; ++tile) {
    const float* rows = decode_tile<V>(item, run, tile, true);
    const int64_t from = std::max(begin, tile * kTile), to = std::min(end, (tile + 1) * kTile);
    for (int64_t h = 0; h < item.heads; ++h) {
      const DenseRows<V> source{rows + h * item.dim * kTile};
      each_block<V>(item.count, [&](auto q, int64_t first) {
        alignas(64) float sums[int(q) * kTile] = {};
        const float* queries = item.queries + (h * item.count + first) * item.dim;
        score_tile<V, q>(source, 0, item.dim, queries, queries, item.dim, sums);
        for (int i = 0; i < q; ++i) {
          std::memcpy(item.scores + (h * item.count + first + i) * item.pitch + at + from - begin,
                      sums + i * kTile + from - tile * kTile, size_t(to - from) * 4);
        }
      });
    }
  }
}

template <class V>
void dense_values(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  for (int64_t tile = begin / kTile; tile * kTile < end; ++tile) {
    const float* rows = decode_tile<V>(item, run, tile, false);
    const int64_t from = std::max(begin, tile * kTile), to = std::min(end, (tile + 1) * kTile);
    for (int64_t h = 0; h < item.heads; ++h) {
      const DenseRows<V> source{rows + h * item.dim * kTile};
      each_block<V>(item.count, [&](auto q, int64_t first) {
        alignas(64) float block[int(q) * kBlockTokens];
        for (int i = 0; i < q; ++i) {
          std::fill(block + i * kBlockTokens, block + i * kBlockTokens + kTile, 0.0f);
          std::memcpy(block + i * kBlockTokens + from - tile * kTile,
                      item.scores + (h * item.count + first + i) * item.pitch + at + from - begin, size_t(to - from) * 4);
        }
        sum_tiles<V, q>(source, 1, 0, item.dim, block, item.lanes + (h * item.count + first) * item.dim * V::W);
      });
    }
  }
}

// f(token counted from begin, head of the item, its float32 channels) for the overrides among tokens [begin, end).
template <class V, class F>
void each_override(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, F&& f) {
  const int32_t* tokens = static_cast<const int32_t*>(run.override_tokens);
  const int32_t* first = std::lower_bound(tokens, tokens + run.overrides, begin);
  for (const int32_t* token = first; token != tokens + run.overrides && *token < end; ++token) {
    for (int64_t h = 0; h < item.heads; ++h) {
      float* channels = item.scratch->small.take(item.dim);
      const int64_t at = ((item.first_head + h) * run.overrides + (token - tokens)) * item.dim;
      to_floats<V>(run.override_dtype, static_cast<const uint8_t*>(run.override_values) + at * (run.override_dtype ? 2 : 4),
                   item.dim, channels);
      f(*token - begin, h, channels);
    }
  }
}

template <class V>
void keys(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  if (is_rows(run)) {
    row_keys<V>(item, run, begin, end, at);
  } else if (is_codes<V>(item, run)) {
    code_keys<V>(item, run, begin, end, at);
  } else {
    dense_keys<V>(item, run, begin, end, at);
  }
  each_override<V>(item, run, begin, end, [&](int64_t token, int64_t h, const float* channels) {
    for (int64_t i = 0; i < item.count; ++i) {
      const float* query = item.queries + (h * item.count + i) * item.dim;
      float sum = 0;
      for (int64_t c = 0; c < item.dim; ++c) sum += query[c] * channels[c];
      item.scores[(h * item.count + i) * item.pitch + at + token] = sum;
    }
  });
}

// Clears the weights of overridden tokens.
template <class V>
void values(const KvItem& item, const KvRun& run, int64_t begin, int64_t end, int64_t at) {
  each_override<V>(item, run, begin, end, [&](int64_t token, int64_t h, const float* channels) {
    for (int64_t i = 0; i < item.count; ++i) {
      float& weight = item.scores[(h * item.count + i) * item.pitch + at + token];
      float* sums = item.sums + (h * item.count + i) * item.dim;
      for (int64_t c = 0; c < item.dim; ++c) sums[c] += weight * channels[c];
      weight = 0;
    }
  });
  if (is_rows(run)) {
    row_values<V>(item, run, begin, end, at);
  } else if (is_codes<V>(item, run)) {
    code_values<V>(item, run, begin, end, at);
  } else {
    dense_values<V>(item, run, begin, end, at);
  }
}

template <class V>
void finish(const KvItem& item) {
  for (int64_t h = 0; h < item.heads; ++h) {
    each_block<V>(item.count, [&](auto q, int64_t first) {
      const int64_t offset = (h * item.count + first) * item.dim;
      add_lanes<V, q>(item.lanes + offset * V::W, item.dim, item.sums + offset);
    });
  }
}

template <class V>
constexpr KvKernels kv_kernels() {
  return {V::W, keys<V>, values<V>, finish<V>, softmax_weights<V>, to_floats<V>};
}

}  // namespace
}  // namespace trimtab
