// The work of one gather_matmul: choose the columns, share the outputs among threads, add the low-rank term, round once.
#include "gather_matmul.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "api.h"
#include "low_rank.h"
#include "numbers.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialProducts = 1 << 16;  // below this, starting threads costs more than they save
constexpr int64_t kBlockSums = 2048;          // outputs times rows that are summed at a time: half the first-level cache
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 2 };

GatherKernel gather_kernel_for(int32_t isa, int32_t dtype) {
  using Table = GatherKernel (*)(int32_t);
  static constexpr Table tables[] = {gather_scalar, gather_avx2, gather_avx512};
  for (isa = isa == TT_ISA_BEST ? TT_ISA_AVX512 : std::min<int32_t>(isa, TT_ISA_AVX512); isa >= TT_ISA_SCALAR; --isa) {
    const GatherKernel kernel = tables[isa](dtype);
    if (kernel && tt_has_isa(isa)) return kernel;
  }
  return nullptr;
}

struct Scratch {
  std::vector<int32_t> chosen;
  std::vector<float> wide, inputs, rest, sums;
  LowRankState low_rank;
};
thread_local Scratch scratch;  // kept between calls

// Puts the columns that count for any row into `chosen`, their inputs (zero for rows where they do not count) into
// `inputs` [rows][in], and, if there is a low-rank term, all others into `rest` [rows][in]. Returns how many.
int64_t choose(const tt_gather_problem& p, const float* scale, const void* x, int64_t rows, Scratch& s) {
  const int64_t n = p.in_features;
  s.chosen.resize(size_t(n));
  s.inputs.resize(size_t(rows * n));
  if (p.rank) s.rest.assign(size_t(rows * n), 0.0f);
  s.wide.resize(size_t(rows * n));
  for (int64_t i = 0; i < rows * n; ++i) s.wide[size_t(i)] = load_number(x, p.x_dtype, i);
  int64_t count = 0;
  for (int64_t j = 0; j < n; ++j) {
    bool any = false;
    for (int64_t b = 0; b < rows; ++b) {
      const float value = s.wide[size_t(b * n + j)];
      const bool counts = !(std::fabs(value) * (scale ? scale[j] : 1.0f) <= p.threshold);  // NaN counts, so that it shows
      s.inputs[size_t(b * n + count)] = counts ? value : 0.0f;
      if (p.rank && !counts) s.rest[size_t(b * n + j)] = value;
      any |= counts;
    }
    s.chosen[size_t(count)] = int32_t(j);
    count += any;
  }
  return count;
}

// The output where the share of thread `id` of `count` begins: threads never write to one vector of sums.
int64_t share(int64_t outputs, int id, int count) {
  return id == count ? outputs : outputs / kGatherLanes * id / count * kGatherLanes;
}

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_gather_matmul(const tt_gather_problem* problem, const void* x, const void* columns,
                                    const float* scale, const void* right, const void* left, void* out, int64_t rows,
                                    int32_t threads) {
  using namespace trimtab;
  const tt_gather_problem& p = *problem;
  const int64_t n = p.in_features, outputs = p.out_features, step = (outputs / kGatherLanes + 1) * kGatherLanes;
  const GatherKernel kernel = gather_kernel_for(p.isa, p.dtype);
  const HalfKernels* factors = p.rank ? half_kernels_for(p.isa, p.factor_dtype == kBfloat16) : nullptr;
  if (!kernel || (p.rank && !factors)) return TT_NO_ISA;
  try {
    Scratch& s = scratch;  // of this thread, not of those that share the work
    const int64_t count = choose(p, scale, x, rows, s);
    s.sums.assign(size_t(rows * step), 0.0f);
    const LowRank term{static_cast<const uint16_t*>(right), static_cast<const uint16_t*>(left), n, step, p.rank,
                       p.factor_dtype};
    if (p.rank) s.low_rank.size(term, rows);
    const bool serial = count * outputs + p.rank * (n + outputs) < kSerialProducts;
    parallel(serial ? 1 : threads, [&](int id, int team_count, auto) {
      const Team team{id, team_count};
      const int64_t begin = share(outputs, id, team_count), end = share(outputs, id + 1, team_count);
      if (p.rank) {
        narrow_inputs(term, s.low_rank, s.rest.data(), kFloat32, rows, team);
        inner_product(*factors, term, s.low_rank, s.rest.data(), kFloat32, rows, team);
      }
      const int64_t block = std::max<int64_t>(kBlockSums / rows / kGatherLanes, 1) * kGatherLanes;
      for (int64_t o = begin; o < end; o += block) {
        kernel({columns, outputs, s.chosen.data(), count, s.inputs.data(), n, rows, o, std::min(o + block, end),
                s.sums.data(), step});
      }
      if (p.rank) {
        team.wait();
        add_outer_product(*factors, term, s.low_rank, s.sums.data(), kFloat32, rows, begin, end);
      }
      for (int64_t b = 0; b < rows; ++b) {
        for (int64_t o = begin; o < end; ++o) store_number(out, p.x_dtype, b * outputs + o, s.sums[size_t(b * step + o)]);
      }
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
