// Tiles of int_matmul on any vector unit `V`, which has: kBytes of a vector of codes (32 or 64), prefetching, shifts and
// masks of 16-bit words, four products of unsigned codes and signed inputs added to each 32-bit sum, their total.
#pragma once

#include "int_matmul.h"
#include "int_rows.h"
#include "simple.h"

namespace trimtab {
namespace {

// Codes v and v + int_vectors(BITS) of each lane, in the low and the high byte of its word.
template <class V, int BITS, int v>
TT_INLINE inline typename V::bytes int_codes(const typename V::bytes* planes) {
  if constexpr (BITS == 8) {
    return planes[0];
  } else if constexpr (BITS != 3) {
    constexpr int kMask = (1 << BITS) - 1;
    return V::both(V::template right<BITS * v>(planes[0]), kMask << 8 | kMask);
  } else {
    constexpr int k = v + 8;
    const auto low = V::both(V::template right<3 * (v % 5)>(planes[v / 5]), 7);
    if constexpr (k == 15) {  // spread over the highest bits
      const auto tops = V::either(V::both(V::template right<7>(planes[0]), 0x100),
                                  V::both(V::template right<6>(planes[1]), 0x200));
      return V::either(V::either(low, tops), V::both(V::template right<5>(planes[2]), 0x400));
    } else {
      return V::either(low, V::both(V::template right<3 * (k % 5) - 8>(planes[k / 5]), 0x700));
    }
  }
}

template <class V, int BITS, int R, int B>
void int_tile(const IntTile& tile) {
  constexpr int kPlanes = words_per_lane(BITS), kVectors = int_vectors(BITS), kParts = kPlaneBytes / V::kBytes;
  typename V::sums sums[R][B];
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { sums[r][b] = V::zero(); }); });
  const int8_t* x = tile.x;
  auto add_block = [&](const uint8_t* block, int64_t row_step) TT_INLINE {
    unroll<kParts>([&](auto part) TT_INLINE {
      typename V::bytes planes[R][kPlanes];
      unroll<R>([&](auto r) TT_INLINE {
        const uint8_t* at = block + r * row_step + part * V::kBytes;
        unroll<kPlanes>([&](auto p) TT_INLINE { planes[r][p] = V::load(at + p * kPlaneBytes); });
      });
      unroll<kVectors>([&](auto v) TT_INLINE {
        typename V::bytes codes[R];
        unroll<R>([&](auto r) TT_INLINE { codes[r] = int_codes<V, BITS, v>(planes[r]); });
        unroll<B>([&](auto b) TT_INLINE {
          const auto value = V::load(reinterpret_cast<const uint8_t*>(x + (v * B + b) * kPlaneBytes + part * V::kBytes));
          unroll<R>([&](auto r) TT_INLINE { sums[r][b] = V::template dot<BITS>(sums[r][b], codes[r], value); });
        });
      });
    });
    x += kVectors * B * kPlaneBytes;
  };
  const uint8_t* block = tile.packed;
  for (int64_t i = 0; i < tile.blocks; ++i, block += kPlanes * kPlaneBytes) {
    if constexpr (B <= 2) {
      unroll<R>([&](auto r) TT_INLINE {
        unroll<kPlanes>([&](auto p) TT_INLINE {
          V::prefetch(block + r * tile.row_step + p * kPlaneBytes + V::kPrefetch / R);
        });
      });
    }
    add_block(block, tile.row_step);
  }
  if (tile.tail_lanes) {
    alignas(64) uint8_t rest[R][kPlanes][kPlaneBytes] = {};
    const size_t bytes = size_t(2 * tile.tail_lanes);
    for (int r = 0; r < R; ++r) {
      for (int p = 0; p < kPlanes; ++p) std::memcpy(rest[r][p], block + r * tile.row_step + p * bytes, bytes);
    }
    add_block(rest[0][0], kPlanes * kPlaneBytes);
  }
  unroll<R>([&](auto r) TT_INLINE {
    unroll<B>([&](auto b) TT_INLINE { tile.out[r * B + b] = V::total(sums[r][b]); });
  });
}

template <class V>
constexpr IntKernels int_kernels() {
  IntKernels kernels{};
  auto fill = [&](auto bits) {
    constexpr int index = bits_index(bits);
    unroll<kWidthCount>([&](auto w) {
      constexpr int rows = V::tile_rows(bits, kWidths[w]);
      kernels.tile_rows[index][w] = rows;
      kernels.tiles[index][w] = int_tile<V, bits, rows, kWidths[w]>;
      kernels.single[index][w] = int_tile<V, bits, 1, kWidths[w]>;
    });
    kernels.place[index] = int_place<bits>;
  };
  fill(std::integral_constant<int, 2>{});
  fill(std::integral_constant<int, 3>{});
  fill(std::integral_constant<int, 4>{});
  fill(std::integral_constant<int, 8>{});
  kernels.to_floats = int_to_floats;
  kernels.round = int_round;
  kernels.sum = int_sum;
  return kernels;
}

}  // namespace
}  // namespace trimtab
