// gather_matmul: sums[b][o] += sum over the chosen columns j of x[b][j] * column[j][o], for few rows b.
//
// gather_matmul.cpp chooses the columns and shares the outputs among threads; a GatherKernel (one per instruction set
// and dtype, from gather_tile.h) adds them, several at a time, so that a sum in the cache is read and written once for
// all of them. Columns are added one after the other: a sum depends on the choice alone.
#pragma once

#include <cstdint>

namespace trimtab {

constexpr int kGatherLanes = 64;  // begin is a multiple of it, and the sums of a row have room for one

struct GatherTile {
  const void* columns;     // [in][out]
  int64_t column_step;     // out
  const int32_t* chosen;   // [count]
  int64_t count;
  const float* x;          // [width][x_step], the inputs of the chosen columns
  int64_t x_step, width;
  int64_t begin, end;      // outputs
  float* sums;             // [width][sums_step]
  int64_t sums_step;
};

using GatherKernel = void (*)(const GatherTile&);

// By the dtype of the columns. Null where the compiler could not. The caller has checked that the machine can.
GatherKernel gather_scalar(int32_t dtype);
GatherKernel gather_avx2(int32_t dtype);
GatherKernel gather_avx512(int32_t dtype);

}  // namespace trimtab
