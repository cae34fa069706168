// The two products of kv_attention on tiles of 32 tokens whose channels are rows: scores of a tile, and weighted sums
// of up to kValueTiles tiles. `V` names the vector unit, `Source` where the rows come from:
//   at<part>(c, t)   tokens [W part, W part + W) of channel c in tile t
#pragma once

#include "kv_attention.h"
#include "simple.h"

namespace trimtab {
namespace {

constexpr int kBlockTokens = kTile * kValueTiles;
constexpr int kScoreAhead = 2;  // tiles that are fetched before they are needed

// Codes of one head, each standing for its level.
template <class V, int BITS>
struct CodeRows {
  static constexpr int kRow = 4 * BITS;
  const uint8_t* tiles;
  int64_t tile_bytes;
  typename V::Table table;
  template <int PART>
  TT_INLINE typename V::floats at(int64_t c, int64_t t) const {
    return V::template decode<BITS, PART>(tiles + t * tile_bytes + c * kRow, table);
  }
  TT_INLINE void prefetch(int64_t c, int64_t t) const { V::prefetch(tiles + t * tile_bytes + c * kRow); }
};

// The same with the scale and minimum of the channel: scales[2 t] for the first 16 tokens of tile t, [2 t + 1] the others.
template <class V, int BITS>
struct ScaledRows {
  CodeRows<V, BITS> codes;
  const float* scales[2 * kValueTiles];
  const float* minima[2 * kValueTiles];
  template <int PART>
  TT_INLINE typename V::floats at(int64_t c, int64_t t) const {
    constexpr int second = PART * V::W / 16;
    return V::fma(codes.template at<PART>(c, t), V::set1(scales[2 * t + second][c]), V::set1(minima[2 * t + second][c]));
  }
  TT_INLINE void prefetch(int64_t c, int64_t t) const { codes.prefetch(c, t); }
};

// Decoded rows of one tile, [channels][32].
template <class V>
struct DenseRows {
  const float* rows;
  template <int PART>
  TT_INLINE typename V::floats at(int64_t c, int64_t) const {
    return V::load(rows + c * kTile + PART * V::W);
  }
  TT_INLINE void prefetch(int64_t, int64_t) const {}
};

// sums[q][32] += queries[q][c] * row c, for channels [begin, end). The first 16 tokens use the first queries.
template <class V, int Q, class Source>
TT_NOINLINE void score_tile(const Source& source, int64_t begin, int64_t end, const float* first,
                                 const float* second, int64_t pitch, float* sums) {
  constexpr int kParts = kTile / V::W, kChains = Q <= 2 ? 2 : 1;  // a sum waits for the one before it
  typename V::floats total[kChains][kParts][Q];
  unroll<kChains>([&](auto u) TT_INLINE {
    unroll<kParts>([&](auto p) TT_INLINE {
      unroll<Q>([&](auto q) TT_INLINE { total[u][p][q] = u ? V::zero() : V::load(sums + q * kTile + p * V::W); });
    });
  });
  auto channel = [&](auto u, int64_t c) TT_INLINE {
    typename V::floats value[kParts];
    unroll<kParts>([&](auto p) TT_INLINE { value[p] = source.template at<p>(c, 0); });
    unroll<Q>([&](auto q) TT_INLINE {
      const auto a = V::set1(first[q * pitch + c]), b = V::set1(second[q * pitch + c]);
      unroll<kParts>([&](auto p) TT_INLINE {
        total[u][p][q] = V::fma(value[p], p * V::W < 16 ? a : b, total[u][p][q]);
      });
    });
  };
  int64_t c = begin;
  for (; c + kChains <= end; c += kChains) {
    source.prefetch(c, kScoreAhead);
    unroll<kChains>([&](auto u) TT_INLINE { channel(u, c + u); });
  }
  for (; c < end; ++c) channel(std::integral_constant<int, 0>{}, c);
  unroll<kParts>([&](auto p) TT_INLINE {
    unroll<Q>([&](auto q) TT_INLINE {
      V::store(sums + q * kTile + p * V::W, kChains == 2 ? V::add(total[0][p][q], total[1][p][q]) : total[0][p][q]);
    });
  });
}

// lanes[c][q][W] += weights[q][t] * row c, over the tokens of `tiles` tiles, for channels [begin, end).
template <class V, int Q, class Source>
TT_NOINLINE void sum_tiles(const Source& source, int64_t tiles, int64_t begin, int64_t end, const float* weights,
                                float* lanes) {
  constexpr int kParts = kTile / V::W, kChannels = Q <= 2 ? 4 : Q == 4 ? 2 : 1;
  auto channels = [&](auto width, int64_t c) TT_INLINE {
    constexpr int count = width;
    typename V::floats total[count][Q];
    unroll<count>([&](auto k) TT_INLINE {
      unroll<Q>([&](auto q) TT_INLINE { total[k][q] = V::load(lanes + ((c + k) * Q + q) * V::W); });
    });
    for (int64_t t = 0; t < tiles; ++t) {
      source.prefetch(c, t + kValueTiles);
      unroll<kParts>([&](auto p) TT_INLINE {
        typename V::floats value[count];
        unroll<count>([&](auto k) TT_INLINE { value[k] = source.template at<p>(c + k, t); });
        unroll<Q>([&](auto q) TT_INLINE {
          const auto w = V::load(weights + q * kBlockTokens + t * kTile + p * V::W);
          unroll<count>([&](auto k) TT_INLINE { total[k][q] = V::fma(value[k], w, total[k][q]); });
        });
      });
    }
    unroll<count>([&](auto k) TT_INLINE {
      unroll<Q>([&](auto q) TT_INLINE { V::store(lanes + ((c + k) * Q + q) * V::W, total[k][q]); });
    });
  };
  int64_t c = begin;
  for (; c + kChannels <= end; c += kChannels) channels(std::integral_constant<int, kChannels>{}, c);
  for (; c < end; ++c) channels(std::integral_constant<int, 1>{}, c);
}

// f(block size as a constant, first query): the queries in blocks of 8, 4, 2, 1, none above the unit's limit.
template <class V, class F>
TT_INLINE inline void each_block(int64_t count, F&& f) {
  for (int64_t first = 0; first < count;) {
    const int64_t left = count - first;
    if (V::kQueries >= 8 && left >= 8) {
      f(std::integral_constant<int, V::kQueries >= 8 ? 8 : 1>{}, first);
      first += 8;
    } else if (V::kQueries >= 4 && left >= 4) {
      f(std::integral_constant<int, V::kQueries >= 4 ? 4 : 1>{}, first);
      first += 4;
    } else if (left >= 2) {
      f(std::integral_constant<int, 2>{}, first);
      first += 2;
    } else {
      f(std::integral_constant<int, 1>{}, first);
      first += 1;
    }
  }
}

// lanes[c][q][W] of one block -> sums[q][c] += their sums.
template <class V, int Q>
TT_NOINLINE void add_lanes(const float* lanes, int64_t dim, float* sums) {
  int64_t c = 0;
  if constexpr (V::W == 8 || V::W == 16) {
    constexpr int kChannels = V::W / Q;
    for (; c + kChannels <= dim; c += kChannels) {
      typename V::floats v[V::W];
      unroll<V::W>([&](auto i) TT_INLINE { v[i] = V::load(lanes + (c * Q + i) * V::W); });
      float each[V::W];
      V::store(each, V::sum_each(v));
      for (int k = 0; k < kChannels; ++k) {
        for (int q = 0; q < Q; ++q) sums[q * dim + c + k] += each[k * Q + q];
      }
    }
  }
  for (; c < dim; ++c) {
    for (int q = 0; q < Q; ++q) sums[q * dim + c] += V::sum(V::load(lanes + (c * Q + q) * V::W));
  }
}

}  // namespace
}  // namespace trimtab
