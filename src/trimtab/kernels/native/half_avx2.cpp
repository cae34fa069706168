// half_linear on AVX2, FMA and F16C: numbers become float32 in registers. Called only where cpuid shows these.
#include "half_tile.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"

namespace trimtab {

const HalfKernels* half_avx2(bool bfloat16) {
  static constexpr HalfKernels bfloats = half_kernels<Avx2Lanes<2>>(), halves = half_kernels<Avx2Lanes<1>>();
  return bfloat16 ? &bfloats : &halves;
}

}  // namespace trimtab
#else
namespace trimtab {
const HalfKernels* half_avx2(bool) { return nullptr; }
}  // namespace trimtab
#endif
