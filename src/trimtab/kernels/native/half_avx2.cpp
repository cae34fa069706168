// half_linear on AVX2, FMA and F16C: numbers become float32 in registers. Called only where cpuid shows these.
#include "half_tile.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace trimtab {
namespace {

template <bool kBfloat>
struct Avx2 {
  static constexpr int kLanes = 8, kRegisters = 16;
  using sums = __m256;
  using values = __m256;

  static sums zero() { return _mm256_setzero_ps(); }
  static values widen(__m128i v) {
    if constexpr (kBfloat) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    return _mm256_cvtph_ps(v);
  }
  static values load(const uint16_t* p) { return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static values load(const uint16_t* p, int count) {
    alignas(16) uint16_t lanes[kLanes] = {};
    std::memcpy(lanes, p, size_t(count) * 2);
    return widen(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
  static sums add_products(sums s, values a, values b) { return _mm256_fmadd_ps(a, b, s); }
  static float total(sums s) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

}  // namespace

const HalfKernels* half_avx2(bool bfloat16) {
  static constexpr HalfKernels bfloats = half_kernels<Avx2<true>>(), halves = half_kernels<Avx2<false>>();
  return bfloat16 ? &bfloats : &halves;
}

}  // namespace trimtab
#else
namespace trimtab {
const HalfKernels* half_avx2(bool) { return nullptr; }
}  // namespace trimtab
#endif
