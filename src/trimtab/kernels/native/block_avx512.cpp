// Rows of a block as the compiler makes them of plain loops with AVX-512 (F, BW, DQ, VL). Called only where cpuid shows these.
#include "block_rows.h"

namespace trimtab {
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
const BlockRows* block_rows_avx512(int32_t dtype) { return own_block_rows(dtype); }
#else
const BlockRows* block_rows_avx512(int32_t) { return nullptr; }
#endif
}  // namespace trimtab
