// Rows of a sparse matrix on AVX-512: sixteen inputs gathered at a time.
#include "sparse_row.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace trimtab {
namespace {

template <int DTYPE>
float gathered_row(const void* values, const int32_t* columns, int64_t entries, const float* x) {
  __m512 sum = _mm512_setzero_ps();
  for (int64_t k = 0; k < entries; k += 16) {
    const __mmask16 lanes = entries - k < 16 ? __mmask16((1u << (entries - k)) - 1) : __mmask16(0xffff);
    const __m512i at = _mm512_maskz_loadu_epi32(lanes, columns + k);
    const __m512 inputs = _mm512_mask_i32gather_ps(_mm512_setzero_ps(), lanes, at, x, 4);
    __m512 value;
    if constexpr (DTYPE == 0) {
      value = _mm512_maskz_loadu_ps(lanes, static_cast<const float*>(values) + k);
    } else {
      const __m256i bits = _mm256_maskz_loadu_epi16(lanes, static_cast<const uint16_t*>(values) + k);
      value = DTYPE == 1 ? _mm512_cvtph_ps(bits)
                         : _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
    }
    sum = _mm512_fmadd_ps(value, inputs, sum);
  }
  return _mm512_reduce_add_ps(sum);
}

}  // namespace

SparseRow sparse_row_avx512(int32_t dtype) {
  return dtype == 0 ? gathered_row<0> : dtype == 1 ? gathered_row<1> : gathered_row<2>;
}

}  // namespace trimtab
#else
namespace trimtab {
SparseRow sparse_row_avx512(int32_t) { return nullptr; }
}  // namespace trimtab
#endif
