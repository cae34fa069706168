// The product of one row of a sparse matrix with a vector: sum_k values[k] * x[columns[k]], in float32.
#pragma once

#include <cstdint>

namespace trimtab {

using SparseRow = float (*)(const void* values, const int32_t* columns, int64_t entries, const float* x);

// dtype: 0 float32, 1 float16, 2 bfloat16.
SparseRow sparse_row_for(int32_t isa, int32_t dtype);

// Null where the compiler could not. The caller has checked that the machine can.
SparseRow sparse_row_avx512(int32_t dtype);

// Values in compressed sparse rows: offsets [out + 1] into values and columns.
struct SparseRows {
  const void* values;
  const int32_t *columns, *offsets;
  int64_t in_features, out_features;
  int32_t dtype;  // of the values
};

// Adds x S^T to outputs [begin, end) of each row; x [rows][in] is float32, out [rows][out] of another dtype.
void add_sparse_rows(SparseRow row, const SparseRows& sparse, const float* x, void* out, int32_t out_dtype, int64_t rows,
                     int64_t begin, int64_t end);

}  // namespace trimtab
