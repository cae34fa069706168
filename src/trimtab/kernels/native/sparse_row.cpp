// Rows of a sparse matrix without intrinsics, and the choice between these and those of an instruction set.
#include "sparse_row.h"

#include "api.h"
#include "numbers.h"

namespace trimtab {
namespace {

template <int DTYPE>
float scalar_row(const void* values, const int32_t* columns, int64_t entries, const float* x) {
  float sum = 0;
  for (int64_t k = 0; k < entries; ++k) {
    float value;
    if constexpr (DTYPE == 0) {
      value = static_cast<const float*>(values)[k];
    } else {
      const uint16_t bits = static_cast<const uint16_t*>(values)[k];
      value = DTYPE == 1 ? half_to_float(bits) : bfloat16_to_float(bits);
    }
    sum += value * x[columns[k]];
  }
  return sum;
}

}  // namespace

SparseRow sparse_row_for(int32_t isa, int32_t dtype) {
  const bool allowed = isa == TT_ISA_BEST || isa >= TT_ISA_AVX512;
  if (allowed && tt_has_isa(TT_ISA_AVX512)) {
    if (const SparseRow row = sparse_row_avx512(dtype)) return row;
  }
  return dtype == 0 ? scalar_row<0> : dtype == 1 ? scalar_row<1> : scalar_row<2>;
}

void add_sparse_rows(SparseRow row, const SparseRows& sparse, const float* x, void* out, int32_t out_dtype, int64_t rows,
                     int64_t begin, int64_t end) {
  const int64_t width = sparse.dtype == 0 ? 4 : 2;
  for (int64_t o = begin; o < end; ++o) {
    const int64_t first = sparse.offsets[o], entries = sparse.offsets[o + 1] - first;
    if (!entries) continue;
    const uint8_t* own = static_cast<const uint8_t*>(sparse.values) + first * width;
    for (int64_t b = 0; b < rows; ++b) {
      const float sum = row(own, sparse.columns + first, entries, x + b * sparse.in_features);
      add_number(out, out_dtype, b * sparse.out_features + o, sum);
    }
  }
}

}  // namespace trimtab
