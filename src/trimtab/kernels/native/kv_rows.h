// Scores and weighted sums of keys and values that lie token by token: exact runs, and tiles decoded to that form.
#pragma once

#include "kv_codes.h"

namespace trimtab {
namespace {

// How a row of channels is read. Pairs: bfloat16, and of each 2 W channels the even ones come before the odd ones.
enum RowFormat { kRowFloat, kRowHalf, kRowBfloat, kRowPairs };

template <class V, int FORMAT>
struct RowReader {
  static constexpr int kStep = FORMAT == kRowPairs ? 2 : 1;  // vectors of one load
  static constexpr int64_t kAhead = 4096;
  const uint8_t* rows;
  int64_t step;  // bytes
  TT_INLINE void load(int64_t token, int64_t vector, typename V::floats (&to)[kStep]) const {
    const uint8_t* at = rows + token * step + vector * V::W * (FORMAT == kRowFloat ? 4 : 2);
    V::prefetch(at + kAhead);
    if constexpr (FORMAT == kRowFloat) {
      to[0] = V::load(reinterpret_cast<const float*>(at));
    } else if constexpr (FORMAT == kRowHalf) {
      to[0] = V::load_half(reinterpret_cast<const uint16_t*>(at));
    } else if constexpr (FORMAT == kRowBfloat) {
      to[0] = V::load_bfloat(reinterpret_cast<const uint16_t*>(at));
    } else {
      V::load_bfloat_pairs(reinterpret_cast<const uint16_t*>(at), to[0], to[1]);
    }
  }
};

// scores[q * pitch + t] = queries[q] . row t, for n rows of `vectors` W channels; queries are in the reader's order.
template <class V, int Q, class Reader>
void score_rows(const Reader& reader, int64_t n, int64_t vectors, const float* queries, float* scores, int64_t pitch) {
  constexpr int kTokens = V::W / Q;  // whose sums fill one vector
  for (int64_t first = 0; first < n; first += kTokens) {
    typename V::floats total[V::W];
    unroll<V::W>([&](auto i) TT_INLINE { total[i] = V::zero(); });
    for (int64_t v = 0; v < vectors; v += Reader::kStep) {
      unroll<kTokens>([&](auto t) TT_INLINE {
        typename V::floats key[Reader::kStep];
        reader.load(std::min(first + t, n - 1), v, key);
        unroll<Reader::kStep>([&](auto s) TT_INLINE {
          unroll<Q>([&](auto q) TT_INLINE {
            total[q * kTokens + t] =
                V::fma(key[s], V::load(queries + (q * vectors + v + s) * V::W), total[q * kTokens + t]);
          });
        });
      });
    }
    float each[V::W];
    V::store(each, V::sum_each(total));
    const int64_t valid = std::min<int64_t>(kTokens, n - first);
    for (int q = 0; q < Q; ++q) {
      if (valid == kTokens) {
        std::memcpy(scores + q * pitch + first, each + q * kTokens, kTokens * 4);
      } else {
        std::memcpy(scores + q * pitch + first, each + q * kTokens, size_t(valid) * 4);
      }
    }
  }
}

// sums[q][vectors * W] += weights[q * pitch + t] * row t, in the reader's order.
template <class V, int Q, class Reader>
void sum_rows(const Reader& reader, int64_t n, int64_t vectors, const float* weights, int64_t pitch, float* sums) {
  constexpr int kWidest = std::max(2, std::min(8, V::kSums / Q));
  auto pass = [&](auto width, int64_t v, int64_t begin, int64_t end) TT_INLINE {
    constexpr int count = width;
    typename V::floats total[Q][count];
    auto at = [&](int q, int i) TT_INLINE { return sums + (q * vectors + v + i) * V::W; };
    unroll<Q>([&](auto q) TT_INLINE { unroll<count>([&](auto i) TT_INLINE { total[q][i] = V::load(at(q, i)); }); });
    for (int64_t t = begin; t < end; ++t) {
      unroll<count / Reader::kStep>([&](auto i) TT_INLINE {
        typename V::floats value[Reader::kStep];
        reader.load(t, v + i * Reader::kStep, value);
        unroll<Q>([&](auto q) TT_INLINE {
          const auto weight = V::set1(weights[q * pitch + t]);
          unroll<Reader::kStep>([&](auto s) TT_INLINE {
            total[q][i * Reader::kStep + s] = V::fma(value[s], weight, total[q][i * Reader::kStep + s]);
          });
        });
      });
    }
    unroll<Q>([&](auto q) TT_INLINE { unroll<count>([&](auto i) TT_INLINE { V::store(at(q, i), total[q][i]); }); });
  };
  const int64_t apart = vectors > kWidest ? 128 : n;  // rows that stay near while their channels are gone through
  for (int64_t begin = 0; begin < n; begin += apart) {
    const int64_t end = std::min(n, begin + apart);
    int64_t v = 0;
    for (; v + kWidest <= vectors; v += kWidest) pass(std::integral_constant<int, kWidest>{}, v, begin, end);
    if constexpr (kWidest > 4) {
      for (; v + 4 <= vectors; v += 4) pass(std::integral_constant<int, 4>{}, v, begin, end);
    }
    if constexpr (kWidest > 2) {
      for (; v + 2 <= vectors; v += 2) pass(std::integral_constant<int, 2>{}, v, begin, end);
    }
    if constexpr (Reader::kStep == 1) {
      for (; v < vectors; ++v) pass(std::integral_constant<int, 1>{}, v, begin, end);
    }
  }
}

// [rows][dim] -> [rows][vectors * W] in the order of a format, and back by adding; channels past dim are zero.
template <class V>
void to_row_order(int format, const float* from, int64_t rows, int64_t dim, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += dim, to += width) {
    std::fill(to + dim, to + width, 0.0f);
    if (format != kRowPairs) {
      std::memcpy(to, from, size_t(dim) * 4);
      continue;
    }
    for (int64_t b = 0; b < dim; b += 2 * V::W) {
      for (int i = 0; i < V::W; ++i) {
        to[b + i] = from[b + 2 * i];
        to[b + V::W + i] = from[b + 2 * i + 1];
      }
    }
  }
}

template <class V>
void add_row_order(int format, const float* from, int64_t rows, int64_t dim, int64_t width, float* to) {
  for (int64_t r = 0; r < rows; ++r, from += width, to += dim) {
    if (format != kRowPairs) {
      for (int64_t c = 0; c < dim; ++c) to[c] += from[c];
      continue;
    }
    for (int64_t b = 0; b < dim; b += 2 * V::W) {
      for (int i = 0; i < V::W; ++i) {
        to[b + 2 * i] += from[b + i];
        to[b + 2 * i + 1] += from[b + V::W + i];
      }
    }
  }
}

template <class V>
int row_format(int32_t dtype, int64_t dim) {
  if (dtype == 0) return kRowFloat;
  if (dtype == 1) return kRowHalf;
  return dim % (2 * V::W) ? kRowBfloat : kRowPairs;
}

// f(reader) for the format that is known at run time only.
template <class V, class F>
TT_INLINE inline void with_reader(int format, const void* rows, int64_t step, F&& f) {
  const uint8_t* at = static_cast<const uint8_t*>(rows);
  switch (format) {
    case kRowFloat: return f(RowReader<V, kRowFloat>{at, step});
    case kRowHalf: return f(RowReader<V, kRowHalf>{at, step});
    case kRowBfloat: return f(RowReader<V, kRowBfloat>{at, step});
    default: return f(RowReader<V, kRowPairs>{at, step});
  }
}

template <class V>
void to_floats(int32_t dtype, const void* from, int64_t n, float* to) {
  if (dtype == 0) {
    std::memcpy(to, from, size_t(n) * 4);
    return;
  }
  const uint16_t* p = static_cast<const uint16_t*>(from);
  int64_t i = 0;
  if (dtype == 1) {
    for (; i + V::W <= n; i += V::W) V::store(to + i, V::load_half(p + i));
    for (; i < n; ++i) to[i] = half_to_float(p[i]);
  } else {
    for (; i < n; ++i) to[i] = bfloat16_to_float(p[i]);
  }
}

// Channels j and j + half of a row, to the position whose cosines and sines these are.
inline void rotate_row(float* x, const float* cos, const float* sin, int64_t half) {
  for (int64_t j = 0; j < half; ++j) {
    const float a = x[j], b = x[j + half];
    x[j] = a * cos[j] - b * sin[j];
    x[j + half] = b * cos[j] + a * sin[j];
  }
}

constexpr int64_t kRowTiles = 4;  // tiles decoded at a time: long enough that a group's codebook stays near

// Codes of one group of coupled channels in one tile, added to what is there.
inline void add_codes(int bits, const uint8_t* row, int shift, uint16_t (&codes)[kTile]) {
  auto each = [&](auto width) {
    for (uint32_t t = 0; t < kTile; ++t) codes[t] = uint16_t(codes[t] | code_at<width>(row, t) << shift);
  };
  switch (bits) {
    case 1: return each(std::integral_constant<int, 1>{});
    case 2: return each(std::integral_constant<int, 2>{});
    case 3: return each(std::integral_constant<int, 3>{});
    case 4: return each(std::integral_constant<int, 4>{});
    default: return each(std::integral_constant<int, 8>{});
  }
}

// Tiles [first, first + tiles) of coupled codes as float16 rows [32 tiles][dim].
inline void decode_coupled(const KvRun& run, int64_t head, int64_t first, int64_t tiles, uint16_t* to) {
  const int64_t dim = run.head_dim, groups = dim / run.coupled, entries = int64_t(1) << run.bits;
  const int low_bits = std::min(run.bits, 8), high_bits = run.bits - low_bits;
  const int64_t begin = (head * tiles_of(run) + first) * groups;
  const uint8_t* low = static_cast<const uint8_t*>(run.codes) + begin * 4 * low_bits;
  const uint8_t* high = static_cast<const uint8_t*>(run.high_codes) + begin * 4 * high_bits;
  const uint16_t* book = static_cast<const uint16_t*>(run.codebook) + head * groups * entries * run.coupled;
  for (int64_t g = 0; g < groups; ++g, book += entries * run.coupled) {
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = tile * groups + g;
      uint16_t* at = to + tile * kTile * dim + g * run.coupled;
      auto copy = [&](auto size) {
        auto one = [&](int t, uint32_t code) TT_INLINE { std::memcpy(at + t * dim, book + code * size, size_t(size) * 2); };
        if (run.bits == 8) {  // codes are whole bytes
          const uint8_t* bytes = low + row * 4 * 8;
          unroll<kTile>([&](auto t) TT_INLINE { one(t, bytes[t % 8 * 4 + t / 8]); });
          return;
        }
        uint16_t codes[kTile] = {};
        add_codes(low_bits, low + row * 4 * low_bits, 0, codes);
        if (high_bits) add_codes(high_bits, high + row * 4 * high_bits, 8, codes);
        for (int t = 0; t < kTile; ++t) one(t, codes[t]);
      };
      switch (run.coupled) {
        case 2: copy(std::integral_constant<int, 2>{}); break;
        case 4: copy(std::integral_constant<int, 4>{}); break;
        case 8: copy(std::integral_constant<int, 8>{}); break;
        default: copy(int(run.coupled));
      }
    }
  }
}

}  // namespace
}  // namespace trimtab
