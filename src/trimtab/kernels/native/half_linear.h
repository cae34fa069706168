// out[b][o] = bias[o] + sum_i x[b][i] * weight[o][i] for few rows b, all of them 16-bit numbers of one format.
//
// half_linear.cpp shares output rows among threads and cuts them into tiles; a HalfKernels table (one per instruction
// set and format, filled from half_tile.h) computes tiles. A sum is taken in an order that depends on in_features
// alone: results depend neither on the number of threads nor on the other rows of x.
#pragma once

#include <cstdint>

namespace trimtab {

constexpr int kHalfRows = 8;  // rows of x that one call takes

// `rows` weight rows x `width` rows of x; which, is the kernel's own template argument.
struct HalfTile {
  const uint16_t* x;       // [width][in]
  const uint16_t* weight;  // first row
  int64_t row_step;        // weights from one row of the tile to the next
  int64_t in_features;
  float* out;              // [rows][width]
};

using HalfTileKernel = void (*)(const HalfTile&);

struct HalfKernels {
  int rows[kHalfRows];               // weight rows of the kernels in `tiles`, by width - 1
  HalfTileKernel tiles[kHalfRows];
  HalfTileKernel single[kHalfRows];  // the same for one weight row
};

// Rows [begin, end) of weight [.][n] times x [rows][n], each result given to `store(row of weight, row of x, sum)`. The
// rows of a tile lie far apart, so that each of its memory streams is as long as it can be.
template <class Store>
void multiply_rows(const HalfKernels& kernels, const uint16_t* x, int64_t rows, const uint16_t* weight, int64_t n,
                   int64_t begin, int64_t end, Store&& store) {
  auto run = [&](HalfTileKernel kernel, int64_t row, int size, int64_t apart) {
    float sums[4 * kHalfRows];
    kernel({x, weight + row * n, apart * n, n, sums});
    for (int r = 0; r < size; ++r) {
      for (int64_t b = 0; b < rows; ++b) store(row + r * apart, b, sums[r * rows + b]);
    }
  };
  const int together = kernels.rows[rows - 1];
  const int64_t apart = (end - begin) / together;
  for (int64_t i = 0; i < apart; ++i) run(kernels.tiles[rows - 1], begin + i, together, apart);
  for (int64_t row = begin + apart * together; row < end; ++row) run(kernels.single[rows - 1], row, 1, 0);
}

// Of the best instruction set up to `isa` that the machine has, or null.
const HalfKernels* half_kernels_for(int32_t isa, bool bfloat16);

// Null where the compiler could not. The caller has checked that the machine can.
const HalfKernels* half_scalar(bool bfloat16);
const HalfKernels* half_avx2(bool bfloat16);
const HalfKernels* half_avx512(bool bfloat16);
const HalfKernels* half_avx512_bf16(bool bfloat16);  // null for float16

}  // namespace trimtab
