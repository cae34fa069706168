// Tiles of dense bfloat16 rows with the dot product instruction, for grid_panel.cpp.
#pragma once

#include <immintrin.h>

#include "grid_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

// Rows of a tile: its sums, a vector of each row and one of x fill the 32 registers.
constexpr int panel_tile_rows(int width) { return width <= 6 ? 4 : 3; }

// The totals of 8 vectors.
TT_INLINE inline __m256 totals(const __m512* v) {
  __m256 h[8];
  unroll<8>([&](auto i) TT_INLINE {
    h[i] = _mm256_add_ps(_mm512_castps512_ps256(v[i]), _mm512_extractf32x8_ps(v[i], 1));
  });
  unroll<4>([&](auto i) TT_INLINE { h[i] = _mm256_hadd_ps(h[2 * i], h[2 * i + 1]); });
  const __m256 low = _mm256_hadd_ps(h[0], h[1]), high = _mm256_hadd_ps(h[2], h[3]);
  return _mm256_add_ps(_mm256_permute2f128_ps(low, high, 0x20), _mm256_permute2f128_ps(low, high, 0x31));
}

template <int R, int B>
void panel_tile(const PanelTile& tile) {
  constexpr int kEights = (R * B + 7) / 8;
  __m512 sums[8 * kEights];  // [width][rows], then padding
  unroll<8 * kEights>([&](auto i) TT_INLINE { sums[i] = _mm512_setzero_ps(); });
  const uint16_t* weights = tile.weights;
  const uint16_t* x = tile.x;
  for (int64_t i = 0; i < tile.steps; ++i, weights += kChunk, x += kChunk * B) {
    __m512bh w[R];
    unroll<R>([&](auto r) TT_INLINE { w[r] = (__m512bh)_mm512_loadu_si512(weights + r * tile.row_step); });
    unroll<B>([&](auto b) TT_INLINE {
      const __m512bh value = (__m512bh)_mm512_loadu_si512(x + kChunk * b);
      unroll<R>([&](auto r) TT_INLINE { sums[b * R + r] = _mm512_dpbf16_ps(sums[b * R + r], w[r], value); });
    });
  }
  alignas(32) float found[8 * kEights];
  unroll<kEights>([&](auto i) TT_INLINE { _mm256_store_ps(found + 8 * i, totals(sums + 8 * i)); });
  for (int b = 0; b < B; ++b) {
    for (int r = 0; r < R; ++r) {
      float& to = tile.out[b * tile.out_step + r];
      to = tile.add ? to + found[b * R + r] : found[b * R + r];
    }
  }
}

}  // namespace
}  // namespace trimtab
