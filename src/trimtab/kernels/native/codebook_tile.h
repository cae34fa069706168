// Tiles of codebook_matmul on any vector unit: `V<G>` holds G numbers and has load (of floats, of halves), zero, add,
// a * b + c, store and total.
#pragma once

#include <type_traits>

#include "codebook_matmul.h"
#include "grid_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

// The sum of the vectors that the codes of one group name, code by code. Codes of one byte have an entry whatever they are.
template <class V, int G, class Code, bool kOne>
TT_INLINE inline auto codebook_vector(const CodebookTile& tile, const Code* codes) {
  using Entry = std::conditional_t<sizeof(Code) == 1, float, uint16_t>;
  const Entry* table = static_cast<const Entry*>(tile.codebooks);
  const uint32_t mask = sizeof(Code) == 1 ? 0xff : uint32_t(tile.entries - 1);
  auto vector = V::load(table + (codes[0] & mask) * G);
  for (int64_t m = 1; !kOne && m < tile.books; ++m) {
    vector = V::add(vector, V::load(table + (m * tile.entries + (codes[m] & mask)) * G));
  }
  return vector;
}

template <class V, int G, class Code, bool kOne, int R, int B>
TT_INLINE inline void add_groups(const CodebookTile& tile) {
  const int64_t books = kOne ? 1 : tile.books;
  typename V::values sums[R][B];
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { sums[r][b] = V::zero(); }); });
  const Code* codes = static_cast<const Code*>(tile.codes);
  for (int64_t j = 0; j < tile.groups; ++j, codes += books) {
    typename V::values x[B];
    unroll<B>([&](auto b) TT_INLINE { x[b] = V::load(tile.x + b * tile.x_step + j * G); });
    unroll<R>([&](auto r) TT_INLINE {
      const auto vector = codebook_vector<V, G, Code, kOne>(tile, codes + r * tile.row_step);
      unroll<B>([&](auto b) TT_INLINE { sums[r][b] = V::multiply_add(vector, x[b], sums[r][b]); });
    });
  }
  unroll<R>([&](auto r) TT_INLINE {
    unroll<B>([&](auto b) TT_INLINE { tile.out[r * B + b] = V::total(sums[r][b]); });
  });
}

template <class V, int G, class Code, int R, int B>
void codebook_tile(const CodebookTile& tile) {
  if (tile.books == 1) {
    add_groups<V, G, Code, true, R, B>(tile);
  } else {
    add_groups<V, G, Code, false, R, B>(tile);
  }
}

template <class V, int G, class Code>
void codebook_decode(const CodebookTile& tile) {
  const Code* codes = static_cast<const Code*>(tile.codes);
  for (int64_t j = 0; j < tile.groups; ++j, codes += tile.books) {
    V::store(tile.out + j * G, codebook_vector<V, G, Code, false>(tile, codes));
  }
}

inline void codebook_to_floats(int32_t dtype, const void* x, int64_t n, float* out) {
  const uint16_t* values = static_cast<const uint16_t*>(x);
  if (dtype == kFloat32) {
    std::memcpy(out, x, size_t(n) * 4);
  } else if (dtype == kFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_to_float(values[i]);
  }
}

inline void codebook_from_floats(int32_t dtype, const float* x, float scale, int64_t n, void* out) {
  uint16_t* values = static_cast<uint16_t*>(out);
  if (dtype == kFloat32) {
    for (int64_t i = 0; i < n; ++i) static_cast<float*>(out)[i] = x[i] * scale;
  } else if (dtype == kFloat16) {
    for (int64_t i = 0; i < n; ++i) values[i] = float_to_half(x[i] * scale);
  } else {
    for (int64_t i = 0; i < n; ++i) values[i] = float_to_bfloat16(x[i] * scale);
  }
}

// kRegisters: half of them hold sums, where there is more than one row of x.
template <template <int> class V, int kRegisters>
constexpr CodebookKernels codebook_kernels() {
  CodebookKernels kernels{};
  auto fill = [&](auto group, auto code) {
    using Code = decltype(code);
    constexpr int wide = sizeof(Code) - 1, G = kCodebookGroups[group];
    unroll<kCodebookWidthCount>([&](auto w) {
      constexpr int width = kCodebookWidths[w], rows = width == 1 ? 4 : kRegisters / 2 / width;
      kernels.rows[w] = rows;
      kernels.tiles[wide][group][w] = codebook_tile<V<G>, G, Code, rows, width>;
      kernels.single[wide][group][w] = codebook_tile<V<G>, G, Code, 1, width>;
    });
    kernels.decode[wide][group] = codebook_decode<V<G>, G, Code>;
  };
  unroll<3>([&](auto group) {
    fill(group, uint8_t{});
    fill(group, uint16_t{});
  });
  kernels.to_floats = codebook_to_floats;
  kernels.from_floats = codebook_from_floats;
  return kernels;
}

}  // namespace
}  // namespace trimtab
