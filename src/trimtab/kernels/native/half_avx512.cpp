// half_linear on AVX-512 (F, BW, DQ, VL): numbers become float32 in registers. Called only where cpuid shows these.
#include "half_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include <immintrin.h>

namespace trimtab {
namespace {

template <bool kBfloat>
struct Avx512 {
  static constexpr int kLanes = 16, kRegisters = 32;
  using sums = __m512;
  using values = __m512;

  static sums zero() { return _mm512_setzero_ps(); }
  static values widen(__m256i v) {
    if constexpr (kBfloat) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    return _mm512_cvtph_ps(v);
  }
  static values load(const uint16_t* p) { return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))); }
  static values load(const uint16_t* p, int count) {
    return widen(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
  }
  static sums add_products(sums s, values a, values b) { return _mm512_fmadd_ps(a, b, s); }
  static float total(sums s) { return _mm512_reduce_add_ps(s); }
};

}  // namespace

const HalfKernels* half_avx512(bool bfloat16) {
  static constexpr HalfKernels bfloats = half_kernels<Avx512<true>>(), halves = half_kernels<Avx512<false>>();
  return bfloat16 ? &bfloats : &halves;
}

}  // namespace trimtab
#else
namespace trimtab {
const HalfKernels* half_avx512(bool) { return nullptr; }
}  // namespace trimtab
#endif
