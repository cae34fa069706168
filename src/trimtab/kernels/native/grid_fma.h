// Tiles with float32 inputs, on any vector unit: weights are decoded to float32 and multiplied by fused multiply-add.
//
// `V` names the vector unit: W lanes of float32 over 32-bit words, each of which holds two 16-bit lanes of the layout.
// The even lanes of a chunk come before the odd ones in x_blocks, so that a word's two lanes need no shuffle.
#pragma once

#include "grid_group.h"
#include "grid_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

template <class V, int BITS>
TT_INLINE inline typename V::floats decode_segment(const Segment& s, const uint8_t* row,
                                                   const typename V::template Grid<BITS>& grid) {
  const uint8_t* at = row + s.byte_offset;
  if (BITS == 3 && s.shift < 0) {
    return V::template decode<BITS, 0>(
        V::top_codes(V::load_lanes(at, s.count), V::load_lanes(at + s.plane_bytes, s.count),
                     V::load_lanes(at + 2 * s.plane_bytes, s.count)), grid);
  }
  return V::template decode<BITS, 0>(V::shift(V::load_lanes(at, s.count), s.shift), grid);
}

template <class V, int BITS, int R, int B>
void fma_tile(const Tile& tile) {
  constexpr int kParts = 16 / V::W;  // vectors of 32-bit words in 32 lanes
  constexpr int kPlanes = words_per_lane(BITS);
  constexpr int kCodes = codes_per_lane(BITS);
  constexpr int64_t kBlockBytes = 2 * kLanes * kPlanes;
  const Plan& plan = *tile.plan;
  typename V::floats sums[R][B];
  typename V::template Grid<BITS> grid[R];
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { sums[r][b] = V::zero(); }); });

  int64_t group = -1, left = 0;
  auto enter = [&](int64_t next) TT_INLINE {
    group = next;
    unroll<R>([&](auto r) TT_INLINE {
      const int64_t at = r * plan.groups + group;
      grid[r] = grid_of<V, BITS>(tile.scales[at], tile.zeros ? tile.zeros + at : nullptr,
                                 tile.levels ? tile.levels + r * tile.level_step : nullptr);
    });
  };

  const float* x = static_cast<const float*>(tile.x_blocks);
  const uint8_t* block = tile.packed;
  for (int64_t i = 0; i < plan.blocks; ++i, block += kBlockBytes) {
    unroll<kCodes>([&](auto k) TT_INLINE {
      if (left == 0) {
        enter(group + 1);
        left = plan.chunks_per_group;
      }
      --left;
      constexpr bool kTop = BITS == 3 && k == 15;
      constexpr int kPlane = BITS == 3 ? k / 5 : 0;
      constexpr int kShift = kTop ? 0 : BITS * (BITS == 3 ? k % 5 : int(k));
      unroll<kParts>([&](auto part) TT_INLINE {
        typename V::words words[R];
        unroll<R>([&](auto r) TT_INLINE {
          const uint8_t* at = block + r * tile.row_step + part * 4 * V::W;
          if constexpr (kTop) {
            words[r] = V::top_codes(V::load(at), V::load(at + 2 * kLanes), V::load(at + 4 * kLanes));
          } else {
            words[r] = V::load(at + kPlane * 2 * kLanes);
            if constexpr (kShift == 0 && part * 4 * V::W % 64 == 0 && B <= 2) V::prefetch(at + kPlane * 2 * kLanes + V::kPrefetch / R);
          }
        });
        unroll<2>([&](auto odd) TT_INLINE {
          typename V::floats w[R];
          unroll<R>([&](auto r) TT_INLINE { w[r] = V::template decode<BITS, 16 * odd + kShift>(words[r], grid[r]); });
          unroll<B>([&](auto b) TT_INLINE {
            const auto value = V::load_floats(x + b * kChunk + odd * 16 + part * V::W);
            unroll<R>([&](auto r) TT_INLINE { sums[r][b] = V::fma(w[r], value, sums[r][b]); });
          });
        });
      });
      x += B * kChunk;
    });
  }

  const float* rest = static_cast<const float*>(tile.x_rest);
  for (int64_t i = 0; i < plan.segment_count; ++i) {
    const Segment& s = plan.segments[i];
    if (s.group != group) enter(s.group);
    typename V::floats w[R];
    unroll<R>([&](auto r) TT_INLINE { w[r] = decode_segment<V, BITS>(s, tile.packed + r * tile.row_step, grid[r]); });
    unroll<B>([&](auto b) TT_INLINE {
      const auto value = V::load_floats(rest + b * tile.rest + s.x_offset, s.count);
      unroll<R>([&](auto r) TT_INLINE { sums[r][b] = V::fma(w[r], value, sums[r][b]); });
    });
  }
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { tile.out[r * B + b] = V::sum(sums[r][b]); }); });
}

template <class V, int BITS>
void decode_row(const Plan& plan, const uint8_t* packed, const float* scales, const float* zeros, const float* levels,
                float* out) {
  typename V::template Grid<BITS> grid;
  int32_t group = -1;
  for (int64_t i = 0; i < plan.segment_count; ++i) {
    const Segment& s = plan.segments[i];
    if (s.group != group) {
      group = s.group;
      grid = grid_of<V, BITS>(scales[group], zeros ? zeros + group : nullptr, levels);
    }
    V::store_floats(out + s.x_offset, decode_segment<V, BITS>(s, packed, grid), s.count);
  }
}

// The kernels of one vector unit, from its rows per tile for each width.
template <class V>
constexpr Kernels fma_kernels(const char* name) {
  Kernels kernels{};
  kernels.name = name;
  kernels.bfloat16_inputs = false;
  kernels.wants_sums = false;
  kernels.segment_lanes = V::W;
  auto fill = [&](auto bits) {
    unroll<kWidthCount>([&](auto w) {
      constexpr int width = kWidths[w];
      kernels.tile_rows[w] = V::kRows[w];
      kernels.tiles[bits_index(bits)][w] = fma_tile<V, bits, V::kRows[w], width>;
      kernels.single[bits_index(bits)][w] = fma_tile<V, bits, 1, width>;
    });
    kernels.rows[bits_index(bits)] = decode_row<V, bits>;
  };
  fill(std::integral_constant<int, 2>{});
  fill(std::integral_constant<int, 3>{});
  fill(std::integral_constant<int, 4>{});
  fill(std::integral_constant<int, 8>{});
  kernels.halves_to_floats = V::halves_to_floats;
  kernels.bytes_to_floats = V::bytes_to_floats;
  kernels.floats_to_bfloats = floats_to_bfloats;
  kernels.group_sums = nullptr;
  kernels.read_all = V::read_all;
  return kernels;
}

}  // namespace
}  // namespace trimtab
