// half_linear on any processor.
#include "half_tile.h"
#include "lanes_scalar.h"

namespace trimtab {

const HalfKernels* half_scalar(bool bfloat16) {
  static constexpr HalfKernels bfloats = half_kernels<ScalarLanes<2>>(), halves = half_kernels<ScalarLanes<1>>();
  return bfloat16 ? &bfloats : &halves;
}

}  // namespace trimtab
