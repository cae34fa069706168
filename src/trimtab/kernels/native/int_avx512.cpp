// int_matmul on AVX-512 without VNNI: the products of int_avx2.cpp, twice as wide.
#include "int_matmul.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "int_vector_avx512.h"

namespace trimtab {
namespace {

struct IntAvx512 : IntAvx512Base {
  template <int BITS>
  static sums dot(sums s, bytes codes, bytes x) {
    if constexpr (BITS == 8) {
      const __m512i even = _mm512_and_si512(codes, _mm512_set1_epi16(0xff)), odd = _mm512_srli_epi16(codes, 8);
      const __m512i x_even = _mm512_srai_epi16(_mm512_slli_epi16(x, 8), 8), x_odd = _mm512_srai_epi16(x, 8);
      return _mm512_add_epi32(s, _mm512_add_epi32(_mm512_madd_epi16(even, x_even), _mm512_madd_epi16(odd, x_odd)));
    }
    return _mm512_add_epi32(s, _mm512_madd_epi16(_mm512_maddubs_epi16(codes, x), _mm512_set1_epi16(1)));
  }
};

}  // namespace

const IntKernels* int_avx512_kernels() {
  static constexpr IntKernels kernels = int_kernels<IntAvx512>();
  return avx512_kernels() ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const IntKernels* int_avx512_kernels() { return nullptr; }
}  // namespace trimtab
#endif
