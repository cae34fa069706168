// codebook_matmul on AVX2: a vector of 16 numbers is two registers.
#include "codebook_matmul.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "codebook_vector.h"

namespace trimtab {
namespace {

struct TwoEights {
  struct values {
    __m256 a, b;
  };
  static values zero() { return {Eight::zero(), Eight::zero()}; }
  static values load(const float* p) { return {Eight::load(p), Eight::load(p + 8)}; }
  static values load(const uint16_t* p) { return {Eight::load(p), Eight::load(p + 8)}; }
  static values add(values x, values y) { return {Eight::add(x.a, y.a), Eight::add(x.b, y.b)}; }
  static values multiply_add(values x, values y, values sum) {
    return {Eight::multiply_add(x.a, y.a, sum.a), Eight::multiply_add(x.b, y.b, sum.b)};
  }
  static void store(float* p, values x) {
    Eight::store(p, x.a);
    Eight::store(p + 8, x.b);
  }
  static float total(values x) { return Eight::total(Eight::add(x.a, x.b)); }
};

template <int G>
using Avx2Vector = std::conditional_t<G == 4, Four, std::conditional_t<G == 8, Eight, TwoEights>>;

}  // namespace

const CodebookKernels* codebook_avx2_kernels() {
  static constexpr CodebookKernels kernels = codebook_kernels<Avx2Vector, 16>();
  return avx2_kernels() ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const CodebookKernels* codebook_avx2_kernels() { return nullptr; }
}  // namespace trimtab
#endif
