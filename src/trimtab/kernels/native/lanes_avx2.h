// Numbers of a stored dtype as 8 float32 lanes. Include only where AVX2, FMA and F16C are compiled for.
#pragma once

#include <immintrin.h>

#include <cstdint>
#include <cstring>
#include <type_traits>

namespace trimtab {
namespace {

// DTYPE: 0 float32, 1 float16, 2 bfloat16.
template <int DTYPE>
struct Avx2Lanes {
  static constexpr int kLanes = 8, kRegisters = 16;
  using stored = std::conditional_t<DTYPE == 0, float, uint16_t>;
  using sums = __m256;
  using values = __m256;

  static sums zero() { return _mm256_setzero_ps(); }
  static values widen(__m128i v) {
    if constexpr (DTYPE == 2) return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(v), 16));
    return _mm256_cvtph_ps(v);
  }
  static values load(const stored* p) {
    if constexpr (DTYPE == 0) {
      return _mm256_loadu_ps(p);
    } else {
      return widen(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    }
  }
  // The first `count` numbers, the others zero and not read.
  static values load(const stored* p, int count) {
    alignas(32) stored lanes[kLanes] = {};
    std::memcpy(lanes, p, size_t(count) * sizeof(stored));
    return load(lanes);
  }
  static values load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static void store_floats(float* p, values v) { _mm256_storeu_ps(p, v); }
  static values broadcast(float value) { return _mm256_set1_ps(value); }
  static sums add_products(sums s, values a, values b) { return _mm256_fmadd_ps(a, b, s); }
  static float total(sums s) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(s), _mm256_extractf128_ps(s, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
};

}  // namespace
}  // namespace trimtab
