// The product of one row of a sparse matrix with a vector: sum_k values[k] * x[columns[k]], in float32.
#pragma once

#include <cstdint>

namespace trimtab {

using SparseRow = float (*)(const void* values, const int32_t* columns, int64_t entries, const float* x);

// dtype: 0 float32, 1 float16, 2 bfloat16.
SparseRow sparse_row_for(int32_t isa, int32_t dtype);

// Null where the compiler could not. The caller has checked that the machine can.
SparseRow sparse_row_avx512(int32_t dtype);

}  // namespace trimtab
