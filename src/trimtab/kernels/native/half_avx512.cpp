// half_linear on AVX-512 (F, BW, DQ, VL): numbers become float32 in registers. Called only where cpuid shows these.
#include "half_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "lanes_avx512.h"

namespace trimtab {

const HalfKernels* half_avx512(bool bfloat16) {
  static constexpr HalfKernels bfloats = half_kernels<Avx512Lanes<2>>(), halves = half_kernels<Avx512Lanes<1>>();
  return bfloat16 ? &bfloats : &halves;
}

}  // namespace trimtab
#else
namespace trimtab {
const HalfKernels* half_avx512(bool) { return nullptr; }
}  // namespace trimtab
#endif
