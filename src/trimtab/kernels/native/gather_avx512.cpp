// gather_matmul on AVX-512 (F, BW, DQ, VL). Called only where cpuid shows these.
#include "gather_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "lanes_avx512.h"

namespace trimtab {
GatherKernel gather_avx512(int32_t dtype) { return gather_table<Avx512Lanes>(dtype); }
}  // namespace trimtab
#else
namespace trimtab {
GatherKernel gather_avx512(int32_t) { return nullptr; }
}  // namespace trimtab
#endif
