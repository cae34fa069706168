// Low-rank terms for few rows of x.
#include "low_rank.h"

#include <algorithm>
#include <cmath>

namespace trimtab {
namespace {

thread_local std::vector<uint16_t> inner;  // [rows][rank]: each thread narrows it for itself

// The largest magnitude of `n` numbers brought to [1, 2) times 2^10 by an exact factor, which is returned; 1 if they
// are all zero or not all finite, so that what is not finite stays so.
float factor_for(float largest) {
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  return std::ldexp(1.0f, std::clamp(10 - std::ilogb(largest), -126, 126));
}

}  // namespace

void LowRankState::size(const LowRank& term, int64_t rows) {
  sums.resize(size_t(rows * term.rank));
  std::fill(undo, undo + kHalfRows, 1.0f);
}

void narrow_inputs(const LowRank& term, LowRankState& state, const void* x, int32_t x_dtype, int64_t rows,
                   const Team& team) {
  const int64_t n = term.in_features;
  if (x_dtype == term.dtype) return;
  if (team.id == 0) {
    state.inputs.resize(size_t(rows * n));
    for (int64_t b = 0; b < rows; ++b) {
      float largest = 0;
      for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(load_number(x, x_dtype, b * n + i)));
      const float factor = factor_for(largest);
      state.undo[b] = 1 / factor;
      for (int64_t i = 0; i < n; ++i) {
        state.inputs[size_t(b * n + i)] = narrow_number(load_number(x, x_dtype, b * n + i) * factor, term.dtype);
      }
    }
  }
  team.wait();
}

void inner_product(const HalfKernels& kernels, const LowRank& term, LowRankState& state, const void* x, int32_t x_dtype,
                   int64_t rows, const Team& team) {
  const uint16_t* from = x_dtype == term.dtype ? static_cast<const uint16_t*>(x) : state.inputs.data();
  multiply_rows(kernels, from, rows, term.right, term.in_features, term.rank * team.id / team.count,
                term.rank * (team.id + 1) / team.count,
                [&](int64_t r, int64_t b, float sum) { state.sums[size_t(b * term.rank + r)] = sum; });
}

void add_outer_product(const HalfKernels& kernels, const LowRank& term, const LowRankState& state, void* out,
                       int32_t x_dtype, int64_t rows, int64_t begin, int64_t end) {
  const int64_t rank = term.rank;
  float undo[kHalfRows];
  inner.resize(size_t(rows * rank));
  for (int64_t b = 0; b < rows; ++b) {
    const float* sums = state.sums.data() + b * rank;
    float largest = 0;
    for (int64_t r = 0; r < rank; ++r) largest = std::max(largest, std::fabs(sums[r]));
    const float factor = factor_for(largest);
    undo[b] = state.undo[b] / factor;
    for (int64_t r = 0; r < rank; ++r) inner[size_t(b * rank + r)] = narrow_number(sums[r] * factor, term.dtype);
  }
  multiply_rows(kernels, inner.data(), rows, term.left, rank, begin, end, [&](int64_t o, int64_t b, float sum) {
    add_number(out, x_dtype, b * term.out_features + o, sum * undo[b]);
  });
}

}  // namespace trimtab
