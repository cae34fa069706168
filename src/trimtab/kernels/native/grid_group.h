// The decoder of one group on any vector unit `V`.
#pragma once

#include "simple.h"

namespace trimtab {
namespace {

// What decodes its codes. zero and levels are null where there are none.
template <class V, int BITS>
TT_INLINE inline typename V::template Grid<BITS> grid_of(float scale, const float* zero, const float* levels) {
  if constexpr (BITS < 8) {
    if (levels) return V::template level_grid<BITS>(scale, levels);
  }
  return V::template grid<BITS>(scale, zero ? *zero : float(1 << (BITS - 1)));
}

}  // namespace
}  // namespace trimtab
