// AVX-512 (F, BW, DQ, VL): 16 float32 lanes. Include only where these are compiled for.
#pragma once

#include <immintrin.h>

#include "grid_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

struct Avx512 {
  static constexpr int W = 16;
  static constexpr int kPrefetch = 8192;  // bytes ahead, over all rows of a tile; by measurement
  static constexpr int kRows[kWidthCount] = {8, 4, 4, 2};
  using floats = __m512;
  using words = __m512i;

  // Up to 4 bits: the values of all codes, scaled, repeated to 16 entries. 8 bits: zero point and scale.
  template <int BITS>
  struct Grid {
    __m512 values, scale;
  };
  static constexpr float kMagic = 8388608.0f;  // 2^23: its low mantissa bits count units

  static floats zero() { return _mm512_setzero_ps(); }
  static words load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  static floats load_floats(const float* p) { return _mm512_loadu_ps(p); }
  static floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
  static float sum(floats v) { return _mm512_reduce_add_ps(v); }
  // Always inline: compilers take a function that only prefetches for one without effect, and drop the call.
  TT_INLINE static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  static words shift(words v, int count) { return _mm512_srl_epi32(v, _mm_cvtsi32_si128(count)); }

  // 16-bit lanes, widened; lanes from `count` on are zero and not read.
  static words load_lanes(const uint8_t* p, int count) {
    return _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
  }
  static floats load_floats(const float* p, int count) {
    return _mm512_maskz_loadu_ps(__mmask16((1u << count) - 1), p);
  }

  static void store_floats(float* p, floats v, int count) {
    _mm512_mask_storeu_ps(p, __mmask16((1u << count) - 1), v);
  }
  // Bit 15 of three words as a code, in both 16-bit lanes.
  static words top_codes(words w0, words w1, words w2) {
    const words low = _mm512_ternarylogic_epi32(_mm512_srli_epi16(w0, 15), _mm512_srli_epi16(w1, 14),
                                                _mm512_set1_epi16(2), 0xD8);  // c ? b : a
    return _mm512_ternarylogic_epi32(low, _mm512_srli_epi16(w2, 13), _mm512_set1_epi16(4), 0xD8);
  }

  template <int BITS>
  static Grid<BITS> grid(float scale, float zero) {
    const __m512 s = _mm512_set1_ps(scale);
    if constexpr (BITS == 8) return {_mm512_set1_ps(zero), s};
    constexpr int m = (1 << BITS) - 1;
    const __m512 codes = _mm512_setr_ps(0, 1, 2, 3, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m, 10 & m, 11 & m, 12 & m,
                                        13 & m, 14 & m, 15 & m);
    return {_mm512_mul_ps(_mm512_sub_ps(codes, _mm512_set1_ps(zero)), s), s};
  }

  template <int BITS>
  static Grid<BITS> level_grid(float scale, const float* levels) {
    constexpr int m = (1 << BITS) - 1;
    const __m512i repeated = _mm512_setr_epi32(0, 1, 2, 3, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m, 10 & m, 11 & m,
                                               12 & m, 13 & m, 14 & m, 15 & m);
    const __m512 s = _mm512_set1_ps(scale), table = _mm512_maskz_loadu_ps(__mmask16((1u << (1 << BITS)) - 1), levels);
    return {_mm512_mul_ps(_mm512_permutexvar_ps(repeated, table), s), s};
  }

  // The weight of the code at bit SHIFT of each word; the lookup sees only the low 4 bits of its index.
  template <int BITS, int SHIFT>
  static floats decode(words v, const Grid<BITS>& g) {
    const words shifted = SHIFT ? _mm512_srli_epi32(v, SHIFT) : v;
    if constexpr (BITS == 8) {
      const words code = _mm512_ternarylogic_epi32(shifted, _mm512_set1_epi32(0xff), _mm512_set1_epi32(0x4B000000),
                                                   0xEA);  // (a & b) | c
      const __m512 number = _mm512_sub_ps(_mm512_castsi512_ps(code), _mm512_set1_ps(kMagic));  // exact
      return _mm512_mul_ps(_mm512_sub_ps(number, g.values), g.scale);
    }
    return _mm512_permutexvar_ps(shifted, g.values);
  }

  static void halves_to_floats(const uint16_t* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
      _mm512_mask_storeu_ps(out + i, m, _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(m, in + i)));
    }
  }
  static void bytes_to_floats(const uint8_t* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 m = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
      const __m512i v = _mm512_cvtepu8_epi32(_mm_maskz_loadu_epi8(m, in + i));
      _mm512_mask_storeu_ps(out + i, m, _mm512_cvtepi32_ps(v));
    }
  }
  static uint64_t read_all(const uint8_t* p, int64_t bytes) {
    __m512i sums[8];
    for (auto& s : sums) s = _mm512_setzero_si512();
    for (int64_t i = 0; i + 512 <= bytes; i += 512) {
      _mm_prefetch(reinterpret_cast<const char*>(p + i + 4096), _MM_HINT_T0);
      for (int j = 0; j < 8; ++j) sums[j] = _mm512_xor_si512(sums[j], _mm512_loadu_si512(p + i + 64 * j));
    }
    for (int j = 1; j < 8; ++j) sums[0] = _mm512_xor_si512(sums[0], sums[j]);
    return uint64_t(_mm512_reduce_add_epi64(sums[0]));
  }
};

}  // namespace
}  // namespace trimtab
