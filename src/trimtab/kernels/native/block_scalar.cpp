// Rows of a block without instruction sets: plain loops.
#include "block_rows.h"

namespace trimtab {
const BlockRows* block_rows_scalar(int32_t dtype) { return own_block_rows(dtype); }
}  // namespace trimtab
