// Tiles of half_linear on any vector unit `V`, which has: kLanes numbers of 16 bits to a vector, kRegisters of them,
// load (and load of the first `count` numbers, the others zero and not read), sums + a * b in float32, their total.
#pragma once

#include <algorithm>

#include "half_linear.h"
#include "simple.h"

namespace trimtab {
namespace {

constexpr int kLine = 32;               // numbers of 16 bits in a cache line
constexpr int64_t kAhead = 4096;        // weights by which prefetching is ahead, over all rows of a tile; by measurement
constexpr int kSecondLevel = 2;         // prefetch past the first-level cache, which holds x; by measurement

template <class V, int R, int B>
void half_tile(const HalfTile& tile) {
  typename V::sums sums[R][B];
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { sums[r][b] = V::zero(); }); });
  const int64_t n = tile.in_features;
  const uint16_t* weight[R];
  unroll<R>([&](auto r) TT_INLINE { weight[r] = tile.weight + r * tile.row_step; });
  auto step = [&](int64_t i, auto load) TT_INLINE {
    typename V::values w[R];
    unroll<R>([&](auto r) TT_INLINE { w[r] = load(weight[r] + i); });
    unroll<B>([&](auto b) TT_INLINE {
      const auto x = load(tile.x + b * n + i);
      unroll<R>([&](auto r) TT_INLINE { sums[r][b] = V::add_products(sums[r][b], w[r], x); });
    });
  };
  int64_t i = 0;
  for (; i + kLine <= n; i += kLine) {
    unroll<R>([&](auto r) TT_INLINE { __builtin_prefetch(weight[r] + i + kAhead / R, 0, kSecondLevel); });
    unroll<kLine / V::kLanes>([&](auto part) TT_INLINE {
      step(i + part * V::kLanes, [](const uint16_t* p) TT_INLINE { return V::load(p); });
    });
  }
  for (; i < n; i += V::kLanes) {
    const int count = int(std::min<int64_t>(V::kLanes, n - i));
    step(i, [count](const uint16_t* p) TT_INLINE { return V::load(p, count); });
  }
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { tile.out[r * B + b] = V::total(sums[r][b]); }); });
}

// As many weight rows as leave their sums, themselves and one vector of x in registers, up to 4 streams of memory.
template <class V>
constexpr int tile_rows(int width) {
  return std::clamp((V::kRegisters - 1) / (width + 1), 1, 4);
}

template <class V>
constexpr HalfKernels half_kernels() {
  HalfKernels kernels{};
  unroll<kHalfRows>([&](auto index) {
    constexpr int width = index + 1, rows = tile_rows<V>(width);
    kernels.rows[index] = rows;
    kernels.tiles[index] = half_tile<V, rows, width>;
    kernels.single[index] = half_tile<V, 1, width>;
  });
  return kernels;
}

}  // namespace
}  // namespace trimtab
