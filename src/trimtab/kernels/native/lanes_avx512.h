// Numbers of a stored dtype as 16 float32 lanes. Include only where AVX-512 (F, BW, DQ, VL) is compiled for.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <type_traits>

namespace trimtab {
namespace {

// DTYPE: 0 float32, 1 float16, 2 bfloat16.
template <int DTYPE>
struct Avx512Lanes {
  static constexpr int kLanes = 16, kRegisters = 32;
  using stored = std::conditional_t<DTYPE == 0, float, uint16_t>;
  using sums = __m512;
  using values = __m512;

  static sums zero() { return _mm512_setzero_ps(); }
  static values widen(__m256i v) {
    if constexpr (DTYPE == 2) return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16));
    return _mm512_cvtph_ps(v);
  }
  static values load(const stored* p) {
    if constexpr (DTYPE == 0) {
      return _mm512_loadu_ps(p);
    } else {
      return widen(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    }
  }
  // The first `count` numbers, the others zero and not read.
  static values load(const stored* p, int count) {
    const __mmask16 first = __mmask16((1u << count) - 1);
    if constexpr (DTYPE == 0) {
      return _mm512_maskz_loadu_ps(first, p);
    } else {
      return widen(_mm256_maskz_loadu_epi16(first, p));
    }
  }
  static values load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static void store_floats(float* p, values v) { _mm512_storeu_ps(p, v); }
  static values broadcast(float value) { return _mm512_set1_ps(value); }
  static sums add_products(sums s, values a, values b) { return _mm512_fmadd_ps(a, b, s); }
  static float total(sums s) { return _mm512_reduce_add_ps(s); }
};

}  // namespace
}  // namespace trimtab
