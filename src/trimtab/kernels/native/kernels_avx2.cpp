// AVX2 and FMA with float32 inputs. Compiled for AVX2, FMA and F16C; called only where cpuid shows them.
#include "grid_fma.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include <immintrin.h>

namespace trimtab {
namespace {

struct Avx2 {
  static constexpr int W = 8;
  static constexpr int kPrefetch = 8192;
  static constexpr int kRows[kWidthCount] = {4, 2, 2, 1};
  using floats = __m256;
  using words = __m256i;

  // Up to 4 bits: the values of codes 0 to 7, repeated if there are fewer, and of codes 8 to 15, scaled.
  // 8 bits: zero point and scale.
  template <int BITS>
  struct Grid {
    __m256 low, high;
  };

  static floats zero() { return _mm256_setzero_ps(); }
  static words load(const uint8_t* p) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)); }
  static floats load_floats(const float* p) { return _mm256_loadu_ps(p); }
  static floats fma(floats a, floats b, floats c) { return _mm256_fmadd_ps(a, b, c); }
  TT_INLINE static void prefetch(const uint8_t* p) {  // see vector_avx512.h
    _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0);
  }
  static words shift(words v, int count) { return _mm256_srl_epi32(v, _mm_cvtsi32_si128(count)); }
  static float sum(floats v) {
    __m128 half = _mm_add_ps(_mm256_castps256_ps128(v), _mm256_extractf128_ps(v, 1));
    half = _mm_add_ps(half, _mm_movehl_ps(half, half));
    return _mm_cvtss_f32(_mm_add_ss(half, _mm_movehdup_ps(half)));
  }

  // 16-bit lanes, widened; lanes from `count` on are zero and not read.
  static words load_lanes(const uint8_t* p, int count) {
    alignas(16) uint16_t lanes[8] = {};
    std::memcpy(lanes, p, size_t(count) * 2);
    return _mm256_cvtepu16_epi32(_mm_load_si128(reinterpret_cast<const __m128i*>(lanes)));
  }
  static floats load_floats(const float* p, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    return _mm256_maskload_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane));
  }

  static void store_floats(float* p, floats v, int count) {
    const __m256i lane = _mm256_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7);
    _mm256_maskstore_ps(p, _mm256_cmpgt_epi32(_mm256_set1_epi32(count), lane), v);
  }
  // Bit 15 of three words as a code, in both 16-bit lanes.
  static words top_codes(words w0, words w1, words w2) {
    const words one = _mm256_and_si256(_mm256_srli_epi16(w1, 14), _mm256_set1_epi16(2));
    const words two = _mm256_and_si256(_mm256_srli_epi16(w2, 13), _mm256_set1_epi16(4));
    return _mm256_or_si256(_mm256_srli_epi16(w0, 15), _mm256_or_si256(one, two));
  }

  template <int BITS>
  static Grid<BITS> grid(float scale, float zero) {
    const __m256 s = _mm256_set1_ps(scale), z = _mm256_set1_ps(zero);
    if constexpr (BITS == 8) return {z, s};
    constexpr int m = (1 << BITS) - 1;
    const __m256 codes = _mm256_setr_ps(0, 1, 2, 3, 4 & m, 5 & m, 6 & m, 7 & m);
    const __m256 more = _mm256_add_ps(codes, _mm256_set1_ps(8));
    return {_mm256_mul_ps(_mm256_sub_ps(codes, z), s), _mm256_mul_ps(_mm256_sub_ps(more, z), s)};
  }
  template <int BITS>
  static Grid<BITS> level_grid(float scale, const float* levels) {
    const __m256 s = _mm256_set1_ps(scale);
    const __m256 low = BITS == 2 ? _mm256_broadcast_ps(reinterpret_cast<const __m128*>(levels)) : _mm256_loadu_ps(levels);
    return {_mm256_mul_ps(low, s), BITS == 4 ? _mm256_mul_ps(_mm256_loadu_ps(levels + 8), s) : low};
  }

  // The weight of the code at bit SHIFT of each word; a lookup sees only the low 3 bits of its index.
  template <int BITS, int SHIFT>
  static floats decode(words v, const Grid<BITS>& g) {
    const words shifted = SHIFT ? _mm256_srli_epi32(v, SHIFT) : v;
    if constexpr (BITS == 8) {
      const words code = _mm256_and_si256(shifted, _mm256_set1_epi32(0xff));
      return _mm256_mul_ps(_mm256_sub_ps(_mm256_cvtepi32_ps(code), g.low), g.high);
    }
    const __m256 low = _mm256_permutevar8x32_ps(g.low, shifted);
    if constexpr (BITS < 4) return low;
    const __m256 sign = _mm256_castsi256_ps(_mm256_slli_epi32(shifted, 28));  // bit 3 of the code
    return _mm256_blendv_ps(low, _mm256_permutevar8x32_ps(g.high, shifted), sign);
  }

  static void halves_to_floats(const uint16_t* in, float* out, int64_t n) {
    int64_t i = 0;
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(out + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(in + i))));
    }
    for (; i < n; ++i) out[i] = half_to_float(in[i]);
  }
  static void bytes_to_floats(const uint8_t* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = float(in[i]);
  }
  static uint64_t read_all(const uint8_t* p, int64_t bytes) {
    __m256i sums[8];
    for (auto& s : sums) s = _mm256_setzero_si256();
    for (int64_t i = 0; i + 256 <= bytes; i += 256) {
      _mm_prefetch(reinterpret_cast<const char*>(p + i + 4096), _MM_HINT_T0);
      for (int j = 0; j < 8; ++j) {
        sums[j] = _mm256_xor_si256(sums[j], _mm256_loadu_si256(reinterpret_cast<const __m256i*>(p + i + 32 * j)));
      }
    }
    for (int j = 1; j < 8; ++j) sums[0] = _mm256_xor_si256(sums[0], sums[j]);
    alignas(32) uint64_t parts[4];
    _mm256_store_si256(reinterpret_cast<__m256i*>(parts), sums[0]);
    return parts[0] ^ parts[1] ^ parts[2] ^ parts[3];
  }
};

}  // namespace

const Kernels* avx2_kernels() {
  static constexpr Kernels kernels = fma_kernels<Avx2>("avx2");
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const Kernels* avx2_kernels() { return nullptr; }
}  // namespace trimtab
#endif
