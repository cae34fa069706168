// int_matmul on AVX2: codes of up to 4 bits are multiplied by bytes, whose 16-bit sums of two products cannot overflow
// (2 * 15 * 128); codes of 8 bits are widened first.
#include "int_tile.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace trimtab {
namespace {

struct IntAvx2 {
  static constexpr int kBytes = 32, kPrefetch = 4096;
  using bytes = __m256i;
  using sums = __m256i;
  static constexpr int tile_rows(int bits, int width) { return bits == 3 || width == 8 ? 1 : width == 4 ? 2 : 4; }

  static sums zero() { return _mm256_setzero_si256(); }
  static bytes load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  TT_INLINE static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  template <int N>
  static bytes right(bytes v) {
    return N < 0 ? _mm256_slli_epi16(v, N < 0 ? -N : 0) : N ? _mm256_srli_epi16(v, N < 0 ? 0 : N) : v;
  }
  static bytes both(bytes v, int mask) { return _mm256_and_si256(v, _mm256_set1_epi16(int16_t(mask))); }
  static bytes either(bytes a, bytes b) { return _mm256_or_si256(a, b); }
  template <int BITS>
  static sums dot(sums s, bytes codes, bytes x) {
    if constexpr (BITS == 8) {
      const __m256i even = _mm256_and_si256(codes, _mm256_set1_epi16(0xff)), odd = _mm256_srli_epi16(codes, 8);
      const __m256i x_even = _mm256_srai_epi16(_mm256_slli_epi16(x, 8), 8), x_odd = _mm256_srai_epi16(x, 8);
      return _mm256_add_epi32(s, _mm256_add_epi32(_mm256_madd_epi16(even, x_even), _mm256_madd_epi16(odd, x_odd)));
    }
    return _mm256_add_epi32(s, _mm256_madd_epi16(_mm256_maddubs_epi16(codes, x), _mm256_set1_epi16(1)));
  }
  static int32_t total(sums s) {
    __m128i half = _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1));
    half = _mm_add_epi32(half, _mm_unpackhi_epi64(half, half));
    return _mm_cvtsi128_si32(_mm_add_epi32(half, _mm_shuffle_epi32(half, 1)));
  }
};

}  // namespace

const IntKernels* int_avx2_kernels() {
  static constexpr IntKernels kernels = int_kernels<IntAvx2>();
  return avx2_kernels() ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const IntKernels* int_avx2_kernels() { return nullptr; }
}  // namespace trimtab
#endif
