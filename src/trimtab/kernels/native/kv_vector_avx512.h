// AVX-512 (F, BW, DQ, VL) for kv_attention: 16 float32 lanes. Include only where these are compiled for.
#pragma once

#include "kv_attention.h"
#include "vector_avx512.h"

namespace trimtab {
namespace {

struct KvAvx512 {
  static constexpr int W = 16;
  static constexpr bool kWholeNumbers = false;
  static constexpr int kQueries = 8;  // at most in a block
  static constexpr int kSums = 16;    // vectors of sums held at a time
  using floats = __m512;
  using words = __m512i;

  TT_INLINE static floats zero() { return _mm512_setzero_ps(); }
  TT_INLINE static floats set1(float v) { return _mm512_set1_ps(v); }
  TT_INLINE static floats load(const float* p) { return _mm512_loadu_ps(p); }
  TT_INLINE static void store(float* p, floats v) { _mm512_storeu_ps(p, v); }
  TT_INLINE static floats add(floats a, floats b) { return _mm512_add_ps(a, b); }
  TT_INLINE static floats sub(floats a, floats b) { return _mm512_sub_ps(a, b); }
  TT_INLINE static floats mul(floats a, floats b) { return _mm512_mul_ps(a, b); }
  TT_INLINE static floats fma(floats a, floats b, floats c) { return _mm512_fmadd_ps(a, b, c); }
  TT_INLINE static floats div(floats a, floats b) { return _mm512_div_ps(a, b); }
  TT_INLINE static floats max(floats a, floats b) { return _mm512_max_ps(a, b); }  // b if one is NaN
  TT_INLINE static floats choose_less(floats a, floats b, floats yes, floats no) {
    return _mm512_mask_blend_ps(_mm512_cmp_ps_mask(a, b, _CMP_LT_OQ), no, yes);
  }
  TT_INLINE static floats round(floats v) { return _mm512_roundscale_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n for whole n in [-126, 127]; 0 for -127.
  TT_INLINE static floats power(floats n) {
    return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127)), 23));
  }
  TT_INLINE static float sum(floats v) { return _mm512_reduce_add_ps(v); }
  TT_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  TT_INLINE static floats load_half(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  TT_INLINE static floats load_half(const uint16_t* p, int64_t count) {  // of fewer numbers; the others are zero
    return _mm512_cvtph_ps(_mm256_maskz_loadu_epi16(__mmask16((1u << count) - 1), p));
  }
  TT_INLINE static floats load_bfloat(const uint16_t* p) {
    const words wide = _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
    return _mm512_castsi512_ps(_mm512_slli_epi32(wide, 16));
  }
  // Numbers 0, 2, 4, ... and 1, 3, 5, ... of 32.
  TT_INLINE static void load_bfloat_pairs(const uint16_t* p, floats& even, floats& odd) {
    const __m512i both = _mm512_loadu_si512(p);
    even = _mm512_castsi512_ps(_mm512_slli_epi32(both, 16));
    odd = _mm512_castsi512_ps(_mm512_and_si512(both, _mm512_set1_epi32(int32_t(0xffff0000u))));
  }

  // The values of codes of up to 4 bits, repeated to 16 entries: the lookup sees only the low 4 bits of its index.
  using Table = floats;
  TT_INLINE static Table table(const float* levels, int bits) {
    alignas(64) float entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = levels ? levels[i & ((1 << bits) - 1)] : float(i & ((1 << bits) - 1));
    return _mm512_load_ps(entries);
  }
  // Value of the codes of tokens [16 PART, 16 PART + 16) of a row.
  template <int BITS, int PART>
  TT_INLINE static floats decode(const uint8_t* row, floats table) {
    if constexpr (BITS == 3) {
      const words low = _mm512_srlv_epi32(pair(row), shifts<2>(16 * PART));
      const words high = _mm512_rorv_epi32(word(row + 8), shifts<1>(16 * PART + 30));  // its bit comes to place 2
      return _mm512_permutexvar_ps(_mm512_ternarylogic_epi32(_mm512_set1_epi32(3), low, high, 0xCA), table);  // a ? b : c
    } else if constexpr (BITS == 8) {
      const words all = _mm512_broadcast_i32x8(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(row)));
      const words code = _mm512_and_si512(_mm512_srlv_epi32(all, shifts<8>(16 * PART)), _mm512_set1_epi32(0xff));
      return _mm512_cvtepi32_ps(code);
    } else {
      const words all = BITS == 4 ? _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)))
                                  : BITS == 2 ? pair(row) : word(row);
      return _mm512_permutexvar_ps(_mm512_srlv_epi32(all, shifts<BITS>(16 * PART)), table);
    }
  }

  // Lane i of the result: the sum of v[i].
  TT_INLINE static floats sum_each(const floats (&v)[16]) {
    floats quads[4];
    unroll<4>([&](auto i) TT_INLINE {
      const floats a = halves(v[4 * i], v[4 * i + 1]), b = halves(v[4 * i + 2], v[4 * i + 3]);
      const __m512d x = _mm512_castps_pd(a), y = _mm512_castps_pd(b);
      quads[i] = add(_mm512_castpd_ps(_mm512_unpacklo_pd(x, y)), _mm512_castpd_ps(_mm512_unpackhi_pd(x, y)));
    });
    const floats low = lanes(quads[0], quads[1]), high = lanes(quads[2], quads[3]);
    return lanes(low, high);
  }

 private:
  template <int BITS>
  TT_INLINE static words shifts(int more) {
    constexpr auto at = [](int j) { return BITS * (j / BITS); };
    return _mm512_add_epi32(_mm512_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7), at(8), at(9),
                                              at(10), at(11), at(12), at(13), at(14), at(15)),
                            _mm512_set1_epi32(more));
  }
  TT_INLINE static words word(const uint8_t* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
  }
  TT_INLINE static words pair(const uint8_t* p) {
    int64_t value;
    std::memcpy(&value, p, 8);
    return _mm512_set1_epi64(value);
  }
  TT_INLINE static floats halves(floats a, floats b) { return add(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b)); }
  TT_INLINE static floats lanes(floats a, floats b) {
    return add(_mm512_shuffle_f32x4(a, b, 0x88), _mm512_shuffle_f32x4(a, b, 0xdd));
  }
};

}  // namespace
}  // namespace trimtab
