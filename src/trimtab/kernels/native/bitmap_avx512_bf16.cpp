// sparse_matmul on AVX-512 BF16 and VBMI2: 32 numbers spread at once and multiplied as they are. The dot product takes
// subnormal numbers as zero.
#include "bitmap_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include <immintrin.h>

namespace trimtab {
namespace {

struct Bf16Bitmap {
  static constexpr int kStep = 32, kRegisters = 32;
  using stored = uint16_t;
  using input = uint16_t;
  using sums = __m512;
  using values = __m512i;

  static sums zero() { return _mm512_setzero_ps(); }
  static values expand(const uint16_t* p, uint32_t bits) {
    return _mm512_maskz_expand_epi16(__mmask32(bits), _mm512_loadu_si512(p));
  }
  static values expand(const uint16_t* p, uint32_t bits, int count) {
    const __mmask32 first = __mmask32((uint64_t(1) << count) - 1);
    return _mm512_maskz_expand_epi16(__mmask32(bits), _mm512_maskz_loadu_epi16(first, p));
  }
  static values load_inputs(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static sums add_products(sums s, values a, values b) { return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b); }
  static float total(sums s) { return _mm512_reduce_add_ps(s); }
};

}  // namespace

const BitmapKernels* bitmap_avx512_bf16() {
  static constexpr BitmapKernels kernels = bitmap_kernels<Bf16Bitmap>();
  return __builtin_cpu_supports("avx512vbmi2") ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const BitmapKernels* bitmap_avx512_bf16() { return nullptr; }
}  // namespace trimtab
#endif
