// Tiles of sparse_matmul on any vector unit `V`, which has: kStep columns to a vector, kRegisters of them, the inputs and
// how they lie (kInputs); load_inputs; sums + a * b in float32, their total; and a `reader` of the kept values of one row: open(bits) before the
// columns of a word, then take(part, bits) for every kStep of them, with zero where no bit is set. With kCareful, a
// reader reads nothing past what the row keeps; else up to kBitmapOverread more.
#pragma once

#include <algorithm>
#include <cstring>

#include "bitmap_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

constexpr int64_t kBitmapAhead = 4096;  // bytes by which prefetching is ahead, over all rows of a tile; by measurement
constexpr int kBitmapCache = 2;         // prefetch past the first-level cache, which holds x

// Numbers. V has `stored` and expand(p, bits), which puts the numbers from p on where bits are set and may read kStep of
// them, or with a count no more than that many.
template <class V>
struct NumberReader {
  static constexpr bool kScaled = false;
  const typename V::stored* at;

  explicit NumberReader(const void* values) : at(static_cast<const typename V::stored*>(values)) {}
  NumberReader() = default;
  template <bool kCareful>
  TT_INLINE void open(uint64_t) {}
  template <bool kCareful>
  TT_INLINE typename V::values take(int, uint32_t bits) {
    const int count = __builtin_popcount(bits);
    const auto spread = kCareful ? V::expand(at, bits, count) : V::expand(at, bits);
    at += count;
    return spread;
  }
};

// Codes, unpacked a word at a time. V has expand(p, bits) of int8 numbers, which may read kStep of them.
template <class V>
struct CodeReader {
  static constexpr bool kScaled = true;
  const uint8_t* at;
  const int8_t* next;
  int8_t codes[kWordColumns + V::kStep];

  explicit CodeReader(const void* values) : at(static_cast<const uint8_t*>(values)) {
    std::memset(codes + kWordColumns, 0, V::kStep);
  }
  CodeReader() = default;
  template <bool kCareful>
  TT_INLINE void open(uint64_t bits) {
    const int bytes = (__builtin_popcountll(bits) + 1) / 2;
    uint8_t packed[kWordColumns / 2] = {};
    std::memcpy(packed, at, kCareful ? size_t(bytes) : sizeof packed);
    for (int i = 0; i < kWordColumns / 2; ++i) {
      codes[2 * i] = int8_t(((packed[i] & 15) ^ 8) - 8);
      codes[2 * i + 1] = int8_t((packed[i] >> 4 ^ 8) - 8);
    }
    at += bytes;
    next = codes;
  }
  template <bool kCareful>
  TT_INLINE typename V::values take(int, uint32_t bits) {
    const auto spread = V::expand(next, bits);
    next += __builtin_popcount(bits);
    return spread;
  }
};

template <class V, int R, int B, bool kCareful>
void bitmap_tile(const BitmapTile& tile) {
  using Reader = typename V::reader;
  static_assert(V::kStep <= kBitmapOverread);
  typename V::sums totals[R][B], sums[R][B];
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { totals[r][b] = V::zero(); }); });
  Reader readers[R];
  unroll<R>([&](auto r) TT_INLINE { readers[r] = Reader(tile.values[r]); });
  const auto* x = static_cast<const typename V::input*>(tile.x);
  const int64_t n = tile.words * kWordColumns;
  int64_t group = 0;
  for (int64_t start = 0; start < tile.words; start += tile.group_words, ++group) {
    unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { sums[r][b] = V::zero(); }); });
    const int64_t stop = std::min(start + tile.group_words, tile.words);
    for (int64_t word = start; word < stop; ++word) {
      uint64_t bits[R];
      unroll<R>([&](auto r) TT_INLINE {
        bits[r] = tile.bitmap[r * tile.row_step + word];
        const char* ahead = reinterpret_cast<const char*>(readers[r].at) + kBitmapAhead / R;
        __builtin_prefetch(ahead, 0, kBitmapCache);
        if constexpr (sizeof(*readers[r].at) == 4) __builtin_prefetch(ahead + 64, 0, kBitmapCache);
        readers[r].template open<kCareful>(bits[r]);
      });
      unroll<kWordColumns / V::kStep>([&](auto part) TT_INLINE {
        typename V::values w[R];
        unroll<R>([&](auto r) TT_INLINE {
          const uint32_t own = uint32_t(bits[r] >> (part * V::kStep)) & uint32_t((uint64_t(1) << V::kStep) - 1);
          w[r] = readers[r].template take<kCareful>(part, own);
        });
        unroll<B>([&](auto b) TT_INLINE {
          const auto inputs = V::load_inputs(x + b * n + word * kWordColumns + part * V::kStep);
          unroll<R>([&](auto r) TT_INLINE { sums[r][b] = V::add_products(sums[r][b], w[r], inputs); });
        });
      });
    }
    unroll<R>([&](auto r) TT_INLINE {
      if constexpr (Reader::kScaled) {
        const float scale = bfloat16_to_float(tile.scales[r][group]);
        unroll<B>([&](auto b) TT_INLINE { totals[r][b] = V::add_scaled(totals[r][b], sums[r][b], scale); });
      } else {
        unroll<B>([&](auto b) TT_INLINE { totals[r][b] = sums[r][b]; });
      }
    });
  }
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { tile.out[r * B + b] = V::total(totals[r][b]); }); });
}

template <class V>
constexpr BitmapKernels bitmap_kernels() {
  BitmapKernels kernels{};
  kernels.inputs = V::kInputs;
  unroll<kBitmapRows>([&](auto index) {
    // as many weight rows as leave their sums (of a group too, with scales), themselves and one vector of x in registers
    constexpr int width = index + 1, own = V::reader::kScaled ? 2 * width + 2 : width + 1;
    constexpr int rows = std::clamp((V::kRegisters - 1) / own, 1, kBitmapTileRows);
    kernels.rows[index] = rows;
    kernels.tiles[index][0] = bitmap_tile<V, rows, width, false>;
    kernels.tiles[index][1] = bitmap_tile<V, rows, width, true>;
    kernels.single[index][0] = bitmap_tile<V, 1, width, false>;
    kernels.single[index][1] = bitmap_tile<V, 1, width, true>;
  });
  return kernels;
}

// The tables of the three dtypes for V<0>, V<1>, V<2>, and of codes for Codes.
template <template <int> class V, class Codes>
const BitmapKernels* bitmap_table(int32_t dtype) {
  static constexpr BitmapKernels tables[] = {bitmap_kernels<V<0>>(), bitmap_kernels<V<1>>(), bitmap_kernels<V<2>>()};
  static constexpr BitmapKernels codes = bitmap_kernels<Codes>();
  return dtype == kCodes ? &codes : &tables[dtype];
}

}  // namespace
}  // namespace trimtab
