// out[t][o] = w[o] * s[t] * sum_j (code[o][j] - 2^(bits-1)) * (q[t][j] - z[t]): whole numbers on both sides, weights in
// the packed layout of packing.py, inputs rounded in the call.
//
// int_matmul.cpp rounds the rows of x, cuts the work into tiles and shares it among threads; an IntKernels table (one per
// instruction set, filled from int_tile.h) rounds rows and computes tiles. Sums are 32-bit integers and exact, so
// results depend neither on the instruction set nor on the number of threads.
#pragma once

#include <cstdint>

#include "grid_matmul.h"

namespace trimtab {

constexpr int kPlaneBytes = 2 * kLanes;  // of one word of all lanes of a block

// A block's codes are multiplied as `int_vectors(bits)` vectors of 64 bytes: bytes 2 l and 2 l + 1 of vector v are codes
// v and v + int_vectors of lane l, a block's weights number v * lanes + l and (v + int_vectors) * lanes + l.
constexpr int int_vectors(int bits) { return codes_per_lane(bits) / 2; }

// `rows` output rows x `width` rows of x; which, is the kernel's own template argument.
struct IntTile {
  const uint8_t* packed;  // first row
  int64_t row_step;       // bytes from one row of the tile to the next
  int64_t blocks;         // of 32 lanes
  int64_t tail_lanes;     // of the last, narrower block; 0: there is none
  const int8_t* x;        // [block][vector][width][64], in the order of the codes; zero where there is no input
  int32_t* out;           // [rows][width] sums of code * x
};

using IntTileKernel = void (*)(const IntTile&);

// How the rows of x are rounded. Symmetric: q = round(x / scale) within +-(2^(bits-1) - 1). Else q = round(x / scale) +
// zero within [0, 2^bits - 1]; q is then given less 2^(bits-1), so that it fits a signed byte.
struct IntRounding {
  int32_t bits;
  bool symmetric;
  float scale;  // 0: the row's own
};

struct IntScale {
  float scale;  // NaN if the row cannot be rounded
  float zero;
};

// Where a row of rounded inputs stands among the `width` rows of its tile.
struct IntPlace {
  int64_t blocks, tail_lanes, width;
  int8_t* x;  // the row's first byte in the layout of IntTile::x
};

struct IntKernels {
  int tile_rows[4][kWidthCount];  // rows of the kernels in `tiles`, by bits and width
  IntTileKernel tiles[4][kWidthCount];
  IntTileKernel single[4][kWidthCount];  // the same for one row
  void (*to_floats)(int32_t dtype, const void* x, int64_t n, float* out);
  IntScale (*round)(const IntRounding& rounding, const float* x, int64_t n, int8_t* q);
  int32_t (*sum)(const int8_t* q, int64_t n);
  void (*place[4])(const int8_t* q, const IntPlace& place);  // by bits; q is zero up to the end of the last block
};

// Null where the compiler or the machine cannot.
const IntKernels* int_scalar_kernels();
const IntKernels* int_avx2_kernels();
const IntKernels* int_avx512_kernels();
const IntKernels* int_avx512_vnni_kernels();

}  // namespace trimtab
