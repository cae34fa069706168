// Keys and values of one head straight from its codes: no dense tile is written.
//
// Keys with groups over tokens: the scale goes into the query, the minimum is one number for each query and group.
// Keys with groups over channels: the scale multiplies the sum over the group. Values with groups over channels: the
// scale goes into the softmax weights. Low rank: (q B) A^T and (p A) B^T. Outliers: a correction for each entry.
#pragma once

#include "kv_codes.h"

namespace trimtab {
namespace {

// The queries of a block as whole numbers, where the unit has products for that.
template <class V, int BITS, int Q>
struct WholeQueries {
  static constexpr bool kTakes = takes_whole_numbers<V, BITS>();
  int64_t dim;
  bool fits = false;
  float* units;   // [groups][Q]
  int8_t* bytes;  // [Q][high, low][dim]

  WholeQueries(const CodeHead<V, BITS>& head, KvScratch& scratch) : dim(head.dim) {
    if constexpr (kTakes) {
      fits = head.template whole_registers<V::template Bytes<BITS>::kChannels>();
      units = scratch.whole.take(head.channel_groups() * Q + (2 * Q * dim + 3) / 4);
      bytes = reinterpret_cast<int8_t*>(units + head.channel_groups() * Q);
    }
  }
  void load(const float* queries, int64_t group, int64_t begin, int64_t end) {
    if constexpr (kTakes) {
      for (int q = 0; fits && q < Q; ++q) {
        int8_t* to = bytes + 2 * q * dim + begin;
        units[group * Q + q] = V::template Bytes<BITS>::round_queries(queries + q * dim + begin, end - begin, to, to + dim);
      }
    } else {
      (void)queries, (void)group, (void)begin, (void)end;
    }
  }
  // As score_tile; or does nothing and returns false.
  bool score(const uint8_t* tile, int64_t group, int64_t begin, int64_t end, float* sums) const {
    if constexpr (kTakes) {
      constexpr int kPart = Q < 4 ? Q : BITS == 4 ? 4 : 2;  // as many as there are registers for
      for (int q = 0; fits && q < Q; q += kPart) {
        V::template Bytes<BITS>::template score_tile<kPart>(tile, begin, end, bytes + 2 * q * dim, dim,
                                                            units + group * Q + q, sums + q * kTile);
      }
    } else {
      (void)tile, (void)group, (void)begin, (void)end, (void)sums;
    }
    return fits;
  }
};

// queries [Q][dim] of the stored basis -> scores of tokens [begin, end) of the run, scores[q * pitch].
template <class V, int BITS, int Q>
void score_codes(const KvRun& run, int64_t h, int64_t begin, int64_t end, const float* queries, float* scores,
                 int64_t pitch, KvScratch& scratch) {
  CodeHead<V, BITS> head(run, h, scratch);
  const int64_t dim = run.head_dim, rank = run.rank, groups = head.channel_groups();
  float* folded = scratch.small.take(2 * Q * dim + Q * (rank + groups));  // [2][Q][dim]
  float* projected = folded + 2 * Q * dim;                                // [Q][rank]: q B
  float* query_sums = projected + Q * rank;                               // [Q][groups]
  float offsets[2][Q] = {};
  WholeQueries<V, BITS, Q> whole(head, scratch);
  for (int q = 0; q < Q; ++q) {
    for (int64_t r = 0; r < rank; ++r) {
      float sum = 0;
      for (int64_t c = 0; c < dim; ++c) sum += queries[q * dim + c] * head.channel_factors[r * dim + c];
      projected[q * rank + r] = sum;
    }
    if (!head.by_channel()) continue;
    head.each_group([&](int64_t i, int64_t from, int64_t to) {
      float sum = 0;
      for (int64_t c = from; c < to; ++c) sum += queries[q * dim + c];
      query_sums[q * groups + i] = sum;
    });
  }
  if (!head.by_token()) {
    head.each_group([&](int64_t i, int64_t from, int64_t to) { whole.load(queries, i, from, to); });
  }
  auto fold = [&](int slot) {  // scales into queries
    const float *s = head.scales + slot * dim, *m = head.minima + slot * dim;
    for (int q = 0; q < Q; ++q) {
      const float* from = queries + q * dim;
      float* to = folded + (slot * Q + q) * dim;
      auto sum = V::zero();
      int64_t c = 0;
      for (; c + V::W <= dim; c += V::W) {
        const auto value = V::load(from + c);
        V::store(to + c, V::mul(value, V::load(s + c)));
        sum = V::fma(value, V::load(m + c), sum);
      }
      float rest = V::sum(sum);
      for (; c < dim; ++c) {
        to[c] = from[c] * s[c];
        rest += from[c] * m[c];
      }
      offsets[slot][q] = rest;
    }
  };
  int64_t loaded[2] = {-1, -1};
  for (int64_t tile = begin / kTile; tile * kTile < end; ++tile) {
    alignas(64) float sums[Q * kTile] = {};
    const auto rows = head.tile(tile);
    int slots[2] = {0, 0};
    if (rank) head.load_token_factors(tile * kTile, kTile);
    if (head.by_token()) {
      const int64_t first = tile * kTile / run.group_tokens;
      const int64_t second = std::min(tile * kTile + 16, run.tokens - 1) / run.group_tokens;
      slots[1] = first != second;
      for (int i = 0; i <= slots[1]; ++i) {
        const int64_t wanted = i ? second : first;
        if (loaded[i] == wanted) continue;
        head.load_group(loaded[i] = wanted, i);
        fold(i);
        if (i == 0) whole.load(folded, 0, 0, dim);
      }
      for (int q = 0; q < Q; ++q) {
        for (int t = 0; t < kTile; ++t) sums[q * kTile + t] = offsets[t < 16 ? slots[0] : slots[1]][q];
      }
      if (slots[1] || !whole.score(rows.tiles, 0, 0, dim, sums)) {
        score_tile<V, Q>(rows, 0, dim, folded, folded + slots[1] * Q * dim, dim, sums);
      }
    } else if (head.by_channel()) {
      head.load_channel_groups(tile * kTile, kTile);
      head.each_group([&](int64_t i, int64_t from, int64_t to) {
        alignas(64) float inner[Q * kTile] = {};
        if (!whole.score(rows.tiles, i, from, to, inner)) score_tile<V, Q>(rows, from, to, queries, queries, dim, inner);
        const float *s = head.scales + i * kBlockTokens, *m = head.minima + i * kBlockTokens;
        for (int q = 0; q < Q; ++q) {
          const auto query_sum = V::set1(query_sums[q * groups + i]);
          for (int t = 0; t < kTile; t += V::W) {
            float* to_sum = sums + q * kTile + t;
            const auto sum = V::fma(V::load(m + t), query_sum, V::load(to_sum));
            V::store(to_sum, V::fma(V::load(inner + q * kTile + t), V::load(s + t), sum));
          }
        }
      });
    } else {
      if (!whole.score(rows.tiles, 0, 0, dim, sums)) score_tile<V, Q>(rows, 0, dim, queries, queries, dim, sums);
    }
    for (int64_t r = 0; r < rank; ++r) {
      for (int q = 0; q < Q; ++q) {
        const auto factor = V::set1(projected[q * rank + r]);
        for (int t = 0; t < kTile; t += V::W) {
          float* at = sums + q * kTile + t;
          V::store(at, V::fma(V::load(head.token_factors + r * kBlockTokens + t), factor, V::load(at)));
        }
      }
    }
    if (run.outlier_starts) {
      const Outliers found = head.corrections(tile, 0, slots, scratch);
      for (int64_t i = 0; i < found.count; ++i) {
        const int c = found.places[i] / kTile, token = found.places[i] % kTile;
        for (int q = 0; q < Q; ++q) sums[q * kTile + token] += queries[q * dim + c] * found.values[i];
      }
    }
    const int64_t from = std::max(begin, tile * kTile), to = std::min(end, (tile + 1) * kTile);
    for (int q = 0; q < Q; ++q) {
      std::memcpy(scores + q * pitch + from - begin, sums + q * kTile + from - tile * kTile, size_t(to - from) * 4);
    }
  }
}

// Weighted sums of a block's codes as whole numbers, where the unit has products for that.
template <class V, int BITS, int Q>
struct WholeWeights {
  static constexpr bool kTakes = takes_whole_numbers<V, BITS>();
  int64_t dim;
  bool fits = false;
  float* lanes;   // [dim / channels of a register][Q][W]
  int8_t* bytes;  // [Q][kValueTiles][high, low][32]

  WholeWeights(const CodeHead<V, BITS>& head, KvScratch& scratch) : dim(head.dim) {
    if constexpr (kTakes) {
      constexpr int64_t kChannels = V::template Bytes<BITS>::kChannels;
      fits = head.template whole_registers<kChannels>() && !head.by_token();
      if (!fits) return;
      const int64_t count = dim / kChannels * Q * V::W;
      lanes = scratch.whole.take(count + Q * kBlockTokens / 2);
      bytes = reinterpret_cast<int8_t*>(lanes + count);
      std::fill(lanes, lanes + count, 0.0f);
    }
  }
  // As sum_tiles; or does nothing and returns false.
  bool sum(const CodeRows<V, BITS>& rows, int64_t tiles, int64_t begin, int64_t end, const float* weights) {
    if constexpr (kTakes) {
      if (!fits) return false;
      float units[Q];
      for (int q = 0; q < Q; ++q) {
        units[q] = V::template Bytes<BITS>::round_weights(weights + q * kBlockTokens, tiles, bytes + 2 * q * kBlockTokens);
      }
      V::template Bytes<BITS>::template sum_tiles<Q>(rows.tiles, rows.tile_bytes, tiles, begin, end, bytes, units, lanes);
    } else {
      (void)rows, (void)tiles, (void)begin, (void)end, (void)weights;
    }
    return fits;
  }
  void finish(float* sums) const {
    if constexpr (kTakes) {
      if (fits) V::template Bytes<BITS>::template add_lanes<Q>(lanes, dim, sums);
    } else {
      (void)sums;
    }
  }
};

// weights[q * pitch] of tokens [begin, end) -> lanes [dim][Q][W] and sums [Q][dim], in the stored basis.
template <class V, int BITS, int Q>
void sum_codes(const KvRun& run, int64_t h, int64_t begin, int64_t end, const float* weights, int64_t pitch,
               float* lanes, float* sums, KvScratch& scratch) {
  CodeHead<V, BITS> head(run, h, scratch);
  const int64_t dim = run.head_dim, rank = run.rank, groups = head.channel_groups();
  float* block = scratch.small.take(2 * Q * kBlockTokens + Q * (rank + groups));  // [Q][kBlockTokens]
  float* scaled = block + Q * kBlockTokens;      // [Q][kBlockTokens]
  float* projected = scaled + Q * kBlockTokens;  // [Q][rank]: p A
  float* offsets = projected + Q * rank;         // [Q][groups]
  std::fill(projected, offsets + Q * groups, 0.0f);
  WholeWeights<V, BITS, Q> whole(head, scratch);
  auto dot = [&](const float* a, const float* b, int64_t n) {
    auto sum = V::zero();
    for (int64_t t = 0; t < n; t += V::W) sum = V::fma(V::load(a + t), V::load(b + t), sum);
    return V::sum(sum);
  };
  for (int64_t first = begin / kTile; first * kTile < end; first += kValueTiles) {
    const int64_t tiles = std::min<int64_t>(kValueTiles, (end + kTile - 1) / kTile - first), n = tiles * kTile;
    const int64_t from = std::max(begin, first * kTile), to = std::min(end, first * kTile + n);
    for (int q = 0; q < Q; ++q) {
      float* row = block + q * kBlockTokens;
      std::fill(row, row + from - first * kTile, 0.0f);
      std::memcpy(row + from - first * kTile, weights + q * pitch + from - begin, size_t(to - from) * 4);
      std::fill(row + to - first * kTile, row + n, 0.0f);
    }
    int slots[2 * kValueTiles] = {};
    const CodeRows<V, BITS> rows = head.tile(first);
    if (rank) head.load_token_factors(first * kTile, n);
    if (head.by_token()) {
      ScaledRows<V, BITS> source{rows, {}, {}};
      int64_t last = -1;
      int used = -1;
      for (int64_t i = 0; i < 2 * tiles; ++i) {
        const int64_t group = std::min(first * kTile + 16 * i, run.tokens - 1) / run.group_tokens;
        if (group != last) head.load_group(last = group, ++used);
        slots[i] = used;
        source.scales[i] = head.scales + used * dim;
        source.minima[i] = head.minima + used * dim;
      }
      sum_tiles<V, Q>(source, tiles, 0, dim, block, lanes);
    } else if (head.by_channel()) {
      head.load_channel_groups(first * kTile, n);
      head.each_group([&](int64_t i, int64_t c, int64_t end_channel) {
        const float *s = head.scales + i * kBlockTokens, *m = head.minima + i * kBlockTokens;
        for (int q = 0; q < Q; ++q) {
          const float* p = block + q * kBlockTokens;
          if (run.minimum) offsets[q * groups + i] += dot(p, m, n);
          for (int64_t t = 0; t < n; t += V::W) {
            V::store(scaled + q * kBlockTokens + t, V::mul(V::load(p + t), V::load(s + t)));
          }
        }
        if (!whole.sum(rows, tiles, c, end_channel, scaled)) sum_tiles<V, Q>(rows, tiles, c, end_channel, scaled, lanes);
      });
    } else if (!whole.sum(rows, tiles, 0, dim, block)) {
      sum_tiles<V, Q>(rows, tiles, 0, dim, block, lanes);
    }
    for (int64_t r = 0; r < rank; ++r) {
      for (int q = 0; q < Q; ++q) {
        projected[q * rank + r] += dot(block + q * kBlockTokens, head.token_factors + r * kBlockTokens, n);
      }
    }
    if (!run.outlier_starts) continue;
    for (int64_t t = 0; t < tiles; ++t) {
      const Outliers found = head.corrections(first, t, slots + 2 * t, scratch);
      for (int64_t i = 0; i < found.count; ++i) {
        const int c = found.places[i] / kTile, token = found.places[i] % kTile;
        for (int q = 0; q < Q; ++q) sums[q * dim + c] += block[q * kBlockTokens + t * kTile + token] * found.values[i];
      }
    }
  }
  whole.finish(sums);
  for (int q = 0; q < Q; ++q) {
    for (int64_t r = 0; r < rank; ++r) {
      for (int64_t c = 0; c < dim; ++c) sums[q * dim + c] += projected[q * rank + r] * head.channel_factors[r * dim + c];
    }
    if (!head.by_channel() || !run.minimum) continue;
    head.each_group([&](int64_t i, int64_t from, int64_t to) {
      for (int64_t c = from; c < to; ++c) sums[q * dim + c] += offsets[q * groups + i];
    });
  }
}

}  // namespace
}  // namespace trimtab
