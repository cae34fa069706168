// sparse_matmul: out[b][o] = sum of weight[o][i] * x[b][i] over the columns i that the bitmap of row o keeps.
//
// tt_sparse_weight (api.h) says how a weight is stored. bitmap_matmul.cpp shares output rows among threads and cuts them
// into tiles; a BitmapKernels table (one per instruction set and dtype, filled from bitmap_tile.h) computes tiles: it
// spreads the values to their columns in registers and multiplies as if they were dense. A sum is taken in an order that
// depends on in_features and group_size alone.
#pragma once

#include <algorithm>
#include <cstdint>
#include <vector>

#include "api.h"
#include "threads.h"

namespace trimtab {

constexpr int kBitmapRows = 8;      // rows of x that one call takes
constexpr int kBitmapTileRows = 4;  // weight rows of the largest tile
constexpr int kWordColumns = 64;
constexpr int kBitmapOverread = 32;  // values, or bytes of codes, up to which a tile may read past the end of a row
constexpr int32_t kCodes = 4;        // the dtype of a weight of codes

// Some weight rows times `width` rows of x; which, is the kernel's own template argument.
struct BitmapTile {
  const void* x;           // [width][words * 64], as the table says
  const uint64_t* bitmap;  // of the first row
  int64_t row_step;        // words from one row of the tile to the next
  int64_t words;           // of a row
  int64_t group_words;     // that share a scale; without scales, all
  const void* values[kBitmapTileRows];
  const uint16_t* scales[kBitmapTileRows];
  float* out;  // [rows][width]
};

using BitmapKernel = void (*)(const BitmapTile&);

// How kernels read x; the last has the 32 even columns of a word in front of its 32 odd ones.
enum BitmapInputs : int32_t { kFloats, kBfloats, kSplitBfloats };

struct BitmapKernels {
  BitmapInputs inputs;
  int rows[kBitmapRows];  // weight rows of the kernels in `tiles`, by width - 1
  // By width - 1. The first may read kBitmapOverread values past the end of a row, the second only the rows' own.
  BitmapKernel tiles[kBitmapRows][2];
  BitmapKernel single[kBitmapRows][2];  // the same for one weight row
};

// By the dtype of the values, or kCodes. Null where the compiler or, for the last, the processor cannot. The caller has
// checked that the machine has the instruction set.
const BitmapKernels* bitmap_scalar(int32_t dtype);
const BitmapKernels* bitmap_avx2(int32_t dtype);
const BitmapKernels* bitmap_avx512(int32_t dtype);
const BitmapKernels* bitmap_avx512_bf16(int32_t dtype);  // of bfloat16 inputs; also needs VBMI2; not of every dtype

// One weight of a call; out is [rows][out] of the dtype of x.
struct SparseJob {
  const tt_sparse_weight* weight;
  const BitmapKernels* kernels;
  void* out;

  int64_t words() const { return (weight->in_features + kWordColumns - 1) / kWordColumns; }
  // What the output rows in front of this one take in memory.
  int64_t bytes_before(int64_t row) const {
    const int64_t width = weight->dtype == kCodes ? 1 : weight->dtype == 0 ? 4 : 2;
    return weight->offsets[row] * width + row * words() * 8;
  }
};

// The product with a weight for x of this dtype; null kernels if there are none.
SparseJob sparse_job(const tt_sparse_weight& weight, int32_t dtype, int32_t isa, void* out);

// Calls f(job, first row, end) for the rows of one of `count` threads. The rows of all weights are one list of work, of
// which each thread takes an equal share of bytes.
template <class F>
void each_sparse_share(const std::vector<SparseJob>& jobs, int id, int count, F&& f) {
  int64_t total = 0, start = 0;
  for (const SparseJob& job : jobs) total += job.bytes_before(job.weight->out_features);
  for (const SparseJob& job : jobs) {
    auto first_row_from = [&](int64_t at) {
      int64_t low = 0, high = job.weight->out_features;
      while (low < high) {
        const int64_t middle = (low + high) / 2;
        (job.bytes_before(middle) < at - start ? low : high) = job.bytes_before(middle) < at - start ? middle + 1 : middle;
      }
      return low;
    };
    const int64_t begin = first_row_from(total * id / count), end = first_row_from(total * (id + 1) / count);
    start += job.bytes_before(job.weight->out_features);
    if (begin < end) f(job, begin, end);
  }
}

// Multiplies: called by every thread of the team. The rows that `each_sparse_share` names for a thread are written by it.
void run_sparse(const std::vector<SparseJob>& jobs, const void* x, int32_t dtype, int64_t rows, const Team& team);

}  // namespace trimtab
