// What a compressed product may have added to it, for few rows of x, in place: out += (x R^T) L^T, and out += x S^T.
//
// Both take x in any dtype of out. The low-rank term: low_rank.h. The sparse term gathers inputs in float32. Every sum is
// float32 and is rounded once, when it is added to out.
#include <new>
#include <vector>

#include "api.h"
#include "low_rank.h"
#include "numbers.h"
#include "sparse_row.h"
#include "threads.h"

namespace trimtab {
namespace {

enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 2 };
constexpr int64_t kSerialProducts = 1 << 16;  // below this, starting threads costs more than they save

struct Scratch {
  LowRankState state;
  std::vector<float> wide;
};
thread_local Scratch scratch;  // kept between calls

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_low_rank_add(const tt_term_problem* problem, const void* x, const void* right, const void* left,
                                   void* out, int64_t rows, int32_t threads) {
  using namespace trimtab;
  const tt_term_problem& p = *problem;
  const int64_t n = p.in_features, rank = p.size;
  const HalfKernels* kernels = half_kernels_for(p.isa, p.dtype == kBfloat16);
  if (!kernels) return TT_NO_ISA;
  try {
    const LowRank term{static_cast<const uint16_t*>(right), static_cast<const uint16_t*>(left), n, p.out_features, rank,
                       p.dtype};
    LowRankState& state = scratch.state;  // of this thread, not of those that share the work
    state.size(term, rows);
    const bool serial = (n + p.out_features) * rank < kSerialProducts;
    parallel(serial ? 1 : threads, [&](int id, int count, auto) {
      const Team team{id, count};
      narrow_inputs(term, state, x, p.x_dtype, rows, team);
      inner_product(*kernels, term, state, x, p.x_dtype, rows, team);
      team.wait();
      add_outer_product(*kernels, term, state, out, p.x_dtype, rows, p.out_features * id / count,
                        p.out_features * (id + 1) / count);
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}

extern "C" int32_t tt_sparse_add(const tt_term_problem* problem, const void* x, const void* values,
                                 const int32_t* columns, const int32_t* offsets, void* out, int64_t rows,
                                 int32_t threads) {
  using namespace trimtab;
  const tt_term_problem& p = *problem;
  const int64_t n = p.in_features;
  const SparseRow row = sparse_row_for(p.isa, p.dtype);
  try {
    const float* wide = static_cast<const float*>(x);
    if (p.x_dtype != kFloat32) {
      scratch.wide.resize(size_t(rows * n));
      for (int64_t i = 0; i < rows * n; ++i) scratch.wide[size_t(i)] = load_number(x, p.x_dtype, i);
      wide = scratch.wide.data();
    }
    const SparseRows sparse{values, columns, offsets, n, p.out_features, p.dtype};
    parallel(p.size * rows < kSerialProducts / 4 ? 1 : threads, [&](int id, int count, auto) {
      add_sparse_rows(row, sparse, wide, out, p.x_dtype, rows, p.out_features * id / count,
                      p.out_features * (id + 1) / count);
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
