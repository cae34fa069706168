// out[t][o] = scale[o] * sum_j x[t][g j ... g j + g) . (sum_m codebook[m][code[o][j][m]]): weights are sums of vectors of
// g = 4, 8 or 16 numbers, one from each of M codebooks.
//
// codebook_matmul.cpp cuts the work into tiles and shares it among threads; a CodebookKernels table (one per instruction
// set, filled from codebook_tile.h) computes tiles. Codes of one byte read codebooks converted to float32, which fit the
// first-level cache; codes of two bytes read float16 ones, of half the size. A sum is taken in an order that depends on
// the layout alone: results depend neither on the number of threads nor on the other rows of x.
#pragma once

#include <cstdint>

namespace trimtab {

constexpr int kCodebookWidths[] = {1, 4};  // rows of x of a tile
constexpr int kCodebookWidthCount = 2;
constexpr int kCodebookGroups[] = {4, 8, 16};
constexpr int kMaxCodebookSums = 16; // outputs of a tile

// `rows` output rows x `width` rows of x; which, is the kernel's own template argument.
struct CodebookTile {
  const void* codes;     // first row; uint8 or uint16 [groups][books]
  int64_t row_step;      // codes from one row of the tile to the next
  int64_t groups, books;
  const void* codebooks;  // [books][entries][g]; float32 with 256 entries for codes of one byte, else float16
  int64_t entries;        // a power of two
  const float* x;         // [width], `x_step` apart
  int64_t x_step;
  float* out;             // [rows][width]; a decoder: the weights of one row, without its scale
};

using CodebookKernel = void (*)(const CodebookTile&);

struct CodebookKernels {
  int rows[kCodebookWidthCount];                       // rows of the kernels in `tiles`, by width
  CodebookKernel tiles[2][3][kCodebookWidthCount];     // [two-byte codes][group][width]
  CodebookKernel single[2][3][kCodebookWidthCount];    // the same for one row
  CodebookKernel decode[2][3];
  void (*to_floats)(int32_t dtype, const void* x, int64_t n, float* out);
  void (*from_floats)(int32_t dtype, const float* x, float scale, int64_t n, void* out);
};

// Null where the compiler or the machine cannot.
const CodebookKernels* codebook_scalar_kernels();
const CodebookKernels* codebook_avx2_kernels();
const CodebookKernels* codebook_avx512_kernels();

}  // namespace trimtab
