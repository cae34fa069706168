// Columns of gather_matmul on the lanes `V` of lanes_*.h.
#pragma once

#include <algorithm>

#include "gather_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

constexpr int kColumns = 8;      // added at a time
constexpr int kGatherCache = 2;  // the next columns are prefetched past the first-level cache, which holds the sums
constexpr int kLineBytes = 64;

template <class V, int K>
void add_columns(const GatherTile& tile, int64_t first) {
  using Stored = typename V::stored;
  static_assert(kGatherLanes % V::kLanes == 0);
  const Stored *column[K], *ahead[K];
  unroll<K>([&](auto k) TT_INLINE {
    const auto* columns = static_cast<const Stored*>(tile.columns);
    column[k] = columns + tile.chosen[first + k] * tile.column_step;
    ahead[k] = columns + tile.chosen[std::min(first + K + k, tile.count - 1)] * tile.column_step;
  });
  const float* x = tile.x + first;
  auto step = [&](int64_t o, auto load) TT_INLINE {
    typename V::values w[K];
    unroll<K>([&](auto k) TT_INLINE { w[k] = load(column[k] + o); });
    for (int64_t b = 0; b < tile.width; ++b) {
      float* at = tile.sums + b * tile.sums_step + o;
      auto sum = V::load_floats(at);
      unroll<K>([&](auto k) TT_INLINE { sum = V::add_products(sum, w[k], V::broadcast(x[b * tile.x_step + k])); });
      V::store_floats(at, sum);
    }
  };
  constexpr int kLine = std::max<int>(V::kLanes, kLineBytes / int(sizeof(Stored)));
  int64_t o = tile.begin;
  for (; o + kLine <= tile.end; o += kLine) {
    unroll<K>([&](auto k) TT_INLINE { __builtin_prefetch(ahead[k] + o, 0, kGatherCache); });
    unroll<kLine / V::kLanes>([&](auto part) TT_INLINE {
      step(o + part * V::kLanes, [](const Stored* p) TT_INLINE { return V::load(p); });
    });
  }
  for (; o < tile.end; o += V::kLanes) {
    const int count = int(std::min<int64_t>(V::kLanes, tile.end - o));
    step(o, [count](const Stored* p) TT_INLINE { return V::load(p, count); });
  }
}

template <class V>
void gather_tile(const GatherTile& tile) {
  int64_t k = 0;
  for (; k + kColumns <= tile.count; k += kColumns) add_columns<V, kColumns>(tile, k);
  for (; k < tile.count; ++k) add_columns<V, 1>(tile, k);
}

// The kernels of the three dtypes for V<0>, V<1>, V<2>.
template <template <int> class V>
GatherKernel gather_table(int32_t dtype) {
  static constexpr GatherKernel kernels[] = {gather_tile<V<0>>, gather_tile<V<1>>, gather_tile<V<2>>};
  return kernels[dtype];
}

}  // namespace
}  // namespace trimtab
