// Rows of a block as the compiler makes them of plain loops with AVX2 and F16C. Called only where cpuid shows these.
#include "block_rows.h"

namespace trimtab {
#if defined(__AVX2__) && defined(__F16C__)
const BlockRows* block_rows_avx2(int32_t dtype) { return own_block_rows(dtype); }
#else
const BlockRows* block_rows_avx2(int32_t) { return nullptr; }
#endif
}  // namespace trimtab
