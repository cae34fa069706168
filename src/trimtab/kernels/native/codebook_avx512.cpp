// codebook_matmul on AVX-512 (F, BW, DQ, VL): a vector of 16 numbers is one register, and there are twice as many.
#include "codebook_matmul.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "codebook_vector.h"

namespace trimtab {
namespace {

struct Sixteen {
  using values = __m512;
  static values zero() { return _mm512_setzero_ps(); }
  static values load(const float* p) { return _mm512_loadu_ps(p); }
  static values load(const uint16_t* p) {
    return _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
  }
  static values add(values a, values b) { return _mm512_add_ps(a, b); }
  static values multiply_add(values a, values b, values sum) { return _mm512_fmadd_ps(a, b, sum); }
  static void store(float* p, values a) { _mm512_storeu_ps(p, a); }
  static float total(values a) { return _mm512_reduce_add_ps(a); }
};

template <int G>
using Avx512Vector = std::conditional_t<G == 4, Four, std::conditional_t<G == 8, Eight, Sixteen>>;

}  // namespace

const CodebookKernels* codebook_avx512_kernels() {
  static constexpr CodebookKernels kernels = codebook_kernels<Avx512Vector, 32>();
  return avx512_kernels() ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const CodebookKernels* codebook_avx512_kernels() { return nullptr; }
}  // namespace trimtab
#endif
