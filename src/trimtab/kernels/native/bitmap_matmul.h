// sparse_matmul: out[b][o] = sum of weight[o][i] * x[b][i] over the columns i that the bitmap of row o keeps.
//
// A row is in_features / 64 words, rounded up, of which bit j of word w keeps column 64 w + j, and its kept values one
// after the other. bitmap_matmul.cpp shares output rows among threads and cuts them into tiles; a BitmapKernels table
// (one per instruction set and dtype, filled from bitmap_tile.h) computes tiles: it spreads the values to their columns
// in registers and multiplies as if they were dense. A sum is taken in an order that depends on in_features alone.
#pragma once

#include <cstdint>

namespace trimtab {

constexpr int kBitmapRows = 8;      // rows of x that one call takes
constexpr int kBitmapTileRows = 4;  // weight rows of the largest tile
constexpr int kWordColumns = 64;
constexpr int kBitmapOverread = 32;  // values up to which a tile may read past the end of a row

// Some weight rows times `width` rows of x; which, is the kernel's own template argument.
struct BitmapTile {
  const void* x;           // [width][words * 64] float32, or bfloat16 where the table says so
  const uint64_t* bitmap;  // of the first row
  int64_t row_step;        // words from one row of the tile to the next
  int64_t words;           // of a row
  const void* values[kBitmapTileRows];
  float* out;              // [rows][width]
};

using BitmapKernel = void (*)(const BitmapTile&);

struct BitmapKernels {
  bool bfloat16_inputs;
  int rows[kBitmapRows];  // weight rows of the kernels in `tiles`, by width - 1
  // By width - 1. The first may read kBitmapOverread values past the end of a row, the second only the rows' own.
  BitmapKernel tiles[kBitmapRows][2];
  BitmapKernel single[kBitmapRows][2];  // the same for one weight row
};

// By the dtype of the values. Null where the compiler or, for the last, the processor cannot. The caller has checked
// that the machine has the instruction set.
const BitmapKernels* bitmap_scalar(int32_t dtype);
const BitmapKernels* bitmap_avx2(int32_t dtype);
const BitmapKernels* bitmap_avx512(int32_t dtype);
const BitmapKernels* bitmap_avx512_bf16();  // of bfloat16 values and inputs; also needs VBMI2

}  // namespace trimtab
