// gather_matmul on AVX2, FMA and F16C. Called only where cpuid shows these.
#include "gather_tile.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"

namespace trimtab {
GatherKernel gather_avx2(int32_t dtype) { return gather_table<Avx2Lanes>(dtype); }
}  // namespace trimtab
#else
namespace trimtab {
GatherKernel gather_avx2(int32_t) { return nullptr; }
}  // namespace trimtab
#endif
