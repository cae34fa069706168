// half_linear on AVX-512 BF16: the dot product instruction, which takes subnormal numbers as zero.
#include "half_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__)
#include <immintrin.h>

namespace trimtab {
namespace {

struct Avx512Bf16 {
  static constexpr int kLanes = 32, kRegisters = 32;
  using sums = __m512;
  using values = __m512i;

  static sums zero() { return _mm512_setzero_ps(); }
  static values load(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static values load(const uint16_t* p, int count) { return _mm512_maskz_loadu_epi16((__mmask32(1) << count) - 1, p); }
  static sums add_products(sums s, values a, values b) { return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b); }
  static float total(sums s) { return _mm512_reduce_add_ps(s); }
};

}  // namespace

const HalfKernels* half_avx512_bf16(bool bfloat16) {
  static constexpr HalfKernels kernels = half_kernels<Avx512Bf16>();
  return bfloat16 ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const HalfKernels* half_avx512_bf16(bool) { return nullptr; }
}  // namespace trimtab
#endif
