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

// Of the best instruction set up to `isa` that the machine has, or null.
const HalfKernels* half_kernels_for(int32_t isa, bool bfloat16);

// Null where the compiler could not. The caller has checked that the machine can.
const HalfKernels* half_scalar(bool bfloat16);
const HalfKernels* half_avx2(bool bfloat16);
const HalfKernels* half_avx512(bool bfloat16);
const HalfKernels* half_avx512_bf16(bool bfloat16);  // null for float16

}  // namespace trimtab
