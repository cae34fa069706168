// Vectors of 4 and 8 numbers for codebook_matmul. Include only where AVX2, FMA and F16C are compiled for.
#pragma once

#include <immintrin.h>

#include "codebook_tile.h"

namespace trimtab {
namespace {

struct Four {
  using values = __m128;
  static values zero() { return _mm_setzero_ps(); }
  static values load(const float* p) { return _mm_loadu_ps(p); }
  static values load(const uint16_t* p) { return _mm_cvtph_ps(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))); }
  static values add(values a, values b) { return _mm_add_ps(a, b); }
  static values multiply_add(values a, values b, values sum) { return _mm_fmadd_ps(a, b, sum); }
  static void store(float* p, values a) { _mm_storeu_ps(p, a); }
  static float total(values a) {
    a = _mm_add_ps(a, _mm_movehl_ps(a, a));
    return _mm_cvtss_f32(_mm_add_ss(a, _mm_movehdup_ps(a)));
  }
};

struct Eight {
  using values = __m256;
  static values zero() { return _mm256_setzero_ps(); }
  static values load(const float* p) { return _mm256_loadu_ps(p); }
  static values load(const uint16_t* p) { return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); }
  static values add(values a, values b) { return _mm256_add_ps(a, b); }
  static values multiply_add(values a, values b, values sum) { return _mm256_fmadd_ps(a, b, sum); }
  static void store(float* p, values a) { _mm256_storeu_ps(p, a); }
  static float total(values a) { return Four::total(_mm_add_ps(_mm256_castps256_ps128(a), _mm256_extractf128_ps(a, 1))); }
};

}  // namespace
}  // namespace trimtab
