// How the rows of one packed weight are walked, and the conversion of their parameters.
#pragma once

#include <vector>

#include "api.h"
#include "grid_matmul.h"

namespace trimtab {

// `chunked`: walk full blocks by chunks where groups allow it; else all is segments. The plan points into `segments`.
Plan make_plan(const tt_grid_weight& weight, int max_lanes, bool chunked, std::vector<Segment>& segments);

int64_t row_bytes(const tt_grid_weight& weight);

// `n` numbers of any dtype from element `at` on.
void load_floats(const Kernels& kernels, int32_t dtype, const void* from, int64_t at, int64_t n, float* to);

inline int64_t dtype_bytes(int32_t dtype) { return dtype == kFloat32 ? 4 : dtype == kUint8 ? 1 : 2; }

}  // namespace trimtab
