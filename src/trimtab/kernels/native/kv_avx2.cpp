// kv_attention for AVX2, FMA and F16C; called only where cpuid shows them.
#include "kv_kernels.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

#include "grid_matmul.h"

namespace trimtab {
namespace {

struct KvAvx2 {
  static constexpr int W = 8;
  static constexpr bool kWholeNumbers = false;
  static constexpr int kQueries = 2;  // at most in a block
  static constexpr int kSums = 8;     // vectors of sums held at a time
  using floats = __m256;
  using words = __m256i;

  TT_INLINE static floats zero() { return _mm256_setzero_ps(); }
  TT_INLINE static floats set1(float v) { return _mm256_set1_ps(v); }
  TT_INLINE static floats load(const float* p) { return _mm256_loadu_ps(p); }
  TT_INLINE static void store(float* p, floats v) { _mm256_storeu_ps(p, v); }
  TT_INLINE static floats add(floats a, floats b) { return _mm256_add_ps(a, b); }
  TT_INLINE static floats sub(floats a, floats b) { return _mm256_sub_ps(a, b); }
  TT_INLINE static floats mul(floats a, floats b) { return _mm256_mul_ps(a, b); }
  TT_INLINE static floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
  TT_INLINE static floats div(floats a, floats b) { return _mm256_div_ps(a, b); }
  TT_INLINE static floats max(floats a, floats b) { return _mm256_max_ps(a, b); }  // b if one is NaN
  TT_INLINE static floats choose_less(floats a, floats b, floats yes, floats no) {
    return _mm256_blendv_ps(no, yes, _mm256_cmp_ps(a, b, _CMP_LT_OQ));
  }
  TT_INLINE static floats round(floats v) { return _mm256_round_ps(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  // 2^n for whole n in [-126, 127]; 0 for -127.
  TT_INLINE static floats power(floats n) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23));
  }
  TT_INLINE static float sum(floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }
  TT_INLINE static void prefetch(const void* p) { _mm_prefetch(static_cast<const char*>(p), _MM_HINT_T0); }

  TT_INLINE static floats load_half(const uint16_t* p) {
    return _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TT_INLINE static floats load_half(const uint16_t* p, int64_t count) {  // of fewer numbers; the others are zero
    uint16_t some[W] = {};
    std::memcpy(some, p, size_t(count) * 2);
    return load_half(some);
  }
  TT_INLINE static floats load_bfloat(const uint16_t* p) {
    const words wide = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(wide, 16));
  }
  // Numbers 0, 2, 4, ... and 1, 3, 5, ... of 16.
  TT_INLINE static void load_bfloat_pairs(const uint16_t* p, floats& even, floats& odd) {
    const words both = _mm256_loadu_si256(reinterpret_cast<const words*>(p));
    even = _mm256_castsi256_ps(_mm256_slli_epi32(both, 16));
    odd = _mm256_castsi256_ps(_mm256_and_si256(both, _mm256_set1_epi32(int32_t(0xffff0000u))));
  }

  // The values of codes of up to 4 bits, repeated to 16 entries; a lookup sees the low 3 bits of its index.
  struct Table {
    floats low, high;
  };
  TT_INLINE static Table table(const float* levels, int bits) {
    float entries[16];
    for (int i = 0; i < 16; ++i) entries[i] = levels ? levels[i & ((1 << bits) - 1)] : float(i & ((1 << bits) - 1));
    return {load(entries), load(entries + 8)};
  }
  // Value of the codes of tokens [8 PART, 8 PART + 8) of a row.
  template <int BITS, int PART>
  TT_INLINE static floats decode(const uint8_t* row, const Table& table) {
    if constexpr (BITS == 3) {
      const words low = _mm256_and_si256(_mm256_srlv_epi32(pair(row), shifts<2>(8 * PART)), _mm256_set1_epi32(3));
      const words high = _mm256_and_si256(_mm256_srlv_epi32(word(row + 8), shifts<1>(8 * PART)), _mm256_set1_epi32(1));
      return _mm256_permutevar8x32_ps(table.low, _mm256_or_si256(low, _mm256_slli_epi32(high, 2)));
    } else if constexpr (BITS == 8) {
      const words all = _mm256_loadu_si256(reinterpret_cast<const words*>(row));
      return _mm256_cvtepi32_ps(_mm256_and_si256(_mm256_srli_epi32(all, 8 * PART), _mm256_set1_epi32(0xff)));
    } else if constexpr (BITS == 4) {
      const words all = _mm256_broadcastsi128_si256(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row)));
      const words code = _mm256_srlv_epi32(all, shifts<4>(8 * PART));
      return _mm256_blendv_ps(_mm256_permutevar8x32_ps(table.low, code), _mm256_permutevar8x32_ps(table.high, code),
                              _mm256_castsi256_ps(_mm256_slli_epi32(code, 28)));
    } else {
      const words all = BITS == 2 ? pair(row) : word(row);
      return _mm256_permutevar8x32_ps(table.low, _mm256_srlv_epi32(all, shifts<BITS>(8 * PART)));
    }
  }

  // Lane i of the result: the sum of v[i].
  TT_INLINE static floats sum_each(const floats (&v)[8]) {
    floats quads[2];
    unroll<2>([&](auto i) TT_INLINE {
      quads[i] = _mm256_hadd_ps(_mm256_hadd_ps(v[4 * i], v[4 * i + 1]), _mm256_hadd_ps(v[4 * i + 2], v[4 * i + 3]));
    });
    return add(_mm256_permute2f128_ps(quads[0], quads[1], 0x20), _mm256_permute2f128_ps(quads[0], quads[1], 0x31));
  }

 private:
  template <int BITS>
  TT_INLINE static words shifts(int more) {
    constexpr auto at = [](int j) { return BITS * (j / BITS); };
    return _mm256_add_epi32(_mm256_setr_epi32(at(0), at(1), at(2), at(3), at(4), at(5), at(6), at(7)),
                            _mm256_set1_epi32(more));
  }
  TT_INLINE static words word(const uint8_t* p) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return _mm256_set1_epi32(value);
  }
  TT_INLINE static words pair(const uint8_t* p) {
    int64_t value;
    std::memcpy(&value, p, 8);
    return _mm256_set1_epi64x(value);
  }
};

}  // namespace

const KvKernels* kv_avx2_kernels() {
  static constexpr KvKernels kernels = kv_kernels<KvAvx2>();
  return avx2_kernels() ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const KvKernels* kv_avx2_kernels() { return nullptr; }
}  // namespace trimtab
#endif
