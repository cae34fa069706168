// out += (x R^T) L^T for few rows of x, as steps that a team takes with what else it does between its waits.
//
// It multiplies in the 16-bit format of the factors, with the kernels of half_linear: x and the inner result are brought
// there by an exact power of two per row that keeps them in range. Sums are float32, rounded once, when added to out.
#pragma once

#include <vector>

#include "half_linear.h"
#include "numbers.h"
#include "threads.h"

namespace trimtab {

struct LowRank {
  const uint16_t *right, *left;  // [rank][in], [out][rank]
  int64_t in_features, out_features, rank;
  int32_t dtype;  // of the factors: 1, 2
};

// Of one term and one x, shared by the team. Kept between calls.
struct LowRankState {
  std::vector<uint16_t> inputs;  // x [rows][in] in the format of the factors, if it has another
  std::vector<float> sums;       // x R^T [rows][rank]
  float undo[kHalfRows];         // what brings the inputs of each row back to their size

  // Before the team starts.
  void size(const LowRank& term, int64_t rows);
};

// Brings the rows of x to the format of the factors; nothing to do, and to wait for, if they have it.
void narrow_inputs(const LowRank& term, LowRankState& state, const void* x, int32_t x_dtype, int64_t rows,
                   const Team& team);

// x R^T; complete after the team's next wait.
void inner_product(const HalfKernels& kernels, const LowRank& term, LowRankState& state, const void* x, int32_t x_dtype,
                   int64_t rows, const Team& team);

// Adds outputs [begin, end) of each row.
void add_outer_product(const HalfKernels& kernels, const LowRank& term, const LowRankState& state, void* out,
                       int32_t x_dtype, int64_t rows, int64_t begin, int64_t end);

}  // namespace trimtab
