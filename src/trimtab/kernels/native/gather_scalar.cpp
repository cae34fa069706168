// gather_matmul on any processor.
#include "gather_tile.h"
#include "lanes_scalar.h"

namespace trimtab {
GatherKernel gather_scalar(int32_t dtype) { return gather_table<ScalarLanes>(dtype); }
}  // namespace trimtab
