// Tiles of sparse_matmul on any vector unit `V`, which has: kStep columns to a vector, kRegisters of them, the stored
// numbers and inputs; expand(p, bits), which puts the numbers from p on where bits are set and zero elsewhere and may
// read kStep numbers, or with a count no more than that many; load_inputs; sums + a * b in float32, their total.
#pragma once

#include <algorithm>

#include "bitmap_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

constexpr int64_t kBitmapAhead = 4096;  // bytes by which prefetching is ahead, over all rows of a tile; by measurement
constexpr int kBitmapCache = 2;         // prefetch past the first-level cache, which holds x

template <class V, int R, int B, bool kCareful>
void bitmap_tile(const BitmapTile& tile) {
  using Stored = typename V::stored;
  static_assert(V::kStep <= kBitmapOverread);
  typename V::sums sums[R][B];
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { sums[r][b] = V::zero(); }); });
  const Stored* values[R];
  unroll<R>([&](auto r) TT_INLINE { values[r] = static_cast<const Stored*>(tile.values[r]); });
  const auto* x = static_cast<const typename V::input*>(tile.x);
  const int64_t n = tile.words * kWordColumns;
  for (int64_t word = 0; word < tile.words; ++word) {
    uint64_t bits[R];
    unroll<R>([&](auto r) TT_INLINE {
      bits[r] = tile.bitmap[r * tile.row_step + word];
      const char* ahead = reinterpret_cast<const char*>(values[r]) + kBitmapAhead / R;
      __builtin_prefetch(ahead, 0, kBitmapCache);
      if constexpr (sizeof(Stored) == 4) __builtin_prefetch(ahead + 64, 0, kBitmapCache);
    });
    unroll<kWordColumns / V::kStep>([&](auto part) TT_INLINE {
      typename V::values w[R];
      unroll<R>([&](auto r) TT_INLINE {
        const uint32_t own = uint32_t(bits[r] >> (part * V::kStep)) & uint32_t((uint64_t(1) << V::kStep) - 1);
        const int count = __builtin_popcount(own);
        w[r] = kCareful ? V::expand(values[r], own, count) : V::expand(values[r], own);
        values[r] += count;
      });
      unroll<B>([&](auto b) TT_INLINE {
        const auto inputs = V::load_inputs(x + b * n + word * kWordColumns + part * V::kStep);
        unroll<R>([&](auto r) TT_INLINE { sums[r][b] = V::add_products(sums[r][b], w[r], inputs); });
      });
    });
  }
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { tile.out[r * B + b] = V::total(sums[r][b]); }); });
}

template <class V>
constexpr BitmapKernels bitmap_kernels() {
  BitmapKernels kernels{};
  kernels.bfloat16_inputs = sizeof(typename V::input) == 2;
  unroll<kBitmapRows>([&](auto index) {
    // as many weight rows as leave their sums, themselves and one vector of x in registers
    constexpr int width = index + 1, rows = std::clamp((V::kRegisters - 1) / (width + 1), 1, kBitmapTileRows);
    kernels.rows[index] = rows;
    kernels.tiles[index][0] = bitmap_tile<V, rows, width, false>;
    kernels.tiles[index][1] = bitmap_tile<V, rows, width, true>;
    kernels.single[index][0] = bitmap_tile<V, 1, width, false>;
    kernels.single[index][1] = bitmap_tile<V, 1, width, true>;
  });
  return kernels;
}

// The tables of the three dtypes for V<0>, V<1>, V<2>.
template <template <int> class V>
const BitmapKernels* bitmap_table(int32_t dtype) {
  static constexpr BitmapKernels tables[] = {bitmap_kernels<V<0>>(), bitmap_kernels<V<1>>(), bitmap_kernels<V<2>>()};
  return &tables[dtype];
}

}  // namespace
}  // namespace trimtab
