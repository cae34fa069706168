// The work of gather_matmul: choose the columns, share them among threads, add the low-rank term, round once.
#include "gather_matmul.h"

#include <algorithm>
#include <cmath>
#include <new>
#include <numeric>

#include "numbers.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialProducts = 1 << 16;  // below this, starting threads costs more than they save
constexpr int64_t kBlockSums = 2048;          // outputs times rows summed at a time: they stay in the first-level cache
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

// The choice for one weight. Every thread makes its own, which takes less than to wait for another's.
struct Choice {
  std::vector<int32_t> chosen;
  std::vector<float> inputs;         // [rows][in], of the chosen columns: zero for rows where they do not count
  std::vector<float> rest;           // [rows][in], of all others
  std::vector<uint16_t> rest_halves;  // the same as it was, if it has the dtype of the factors
  int64_t from[kGatherParts + 1];    // where the chosen inputs of each range begin
};

struct Scratch {
  std::vector<float> wide;  // x [rows][in]
  std::vector<Choice> choices;
};
thread_local Scratch scratch;  // kept between calls

// The first input of a range.
int64_t part_begin(int64_t n, int64_t part) { return n * part / kGatherParts; }

void widen(const void* x, int32_t dtype, int64_t count, std::vector<float>& wide) {
  wide.resize(size_t(count));
  const auto* halves = static_cast<const uint16_t*>(x);
  if (dtype == kBfloat16) {
    for (int64_t i = 0; i < count; ++i) wide[size_t(i)] = bfloat16_to_float(halves[i]);
  } else {
    for (int64_t i = 0; i < count; ++i) wide[size_t(i)] = load_number(x, dtype, i);
  }
}

// NaN counts, so that it shows.
bool counts(float value, const float* scale, int64_t j, float threshold) {
  return !(std::fabs(value) * (scale ? scale[j] : 1.0f) <= threshold);
}

void choose(const tt_gather_weight& w, const float* wide, int64_t rows, Choice& c) {
  const int64_t n = w.in_features;
  const float threshold = *w.threshold;
  c.chosen.resize(size_t(n));
  c.inputs.resize(size_t(rows * n));
  int32_t* const chosen = c.chosen.data();
  float* const inputs = c.inputs.data();
  int64_t count = 0;
  for (int64_t part = 0; part < kGatherParts; ++part) {
    c.from[part] = count;
    for (int64_t j = part_begin(n, part); j < part_begin(n, part + 1); ++j) {
      bool any = false;
      for (int64_t b = 0; b < rows; ++b) {
        const float value = wide[b * n + j];
        const bool own = counts(value, w.scale, j, threshold);
        inputs[b * n + count] = own ? value : 0.0f;
        any |= own;
      }
      chosen[count] = int32_t(j);
      count += any;
    }
  }
  c.from[kGatherParts] = count;
}

// What the low-rank term multiplies: x where it does not count, in its own dtype if that is the factors'.
const void* choose_rest(const tt_gather_weight& w, const void* x, int32_t dtype, const float* wide, int64_t rows,
                        Choice& c) {
  const int64_t n = w.in_features;
  const float threshold = *w.threshold;
  const bool same = dtype == w.factor_dtype;
  (same ? c.rest.resize(0) : c.rest.resize(size_t(rows * n)));
  (same ? c.rest_halves.resize(size_t(rows * n)) : c.rest_halves.resize(0));
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t j = 0; j < n; ++j) {
      const int64_t at = b * n + j;
      const bool own = counts(wide[at], w.scale, j, threshold);
      if (same) {
        c.rest_halves[size_t(at)] = own ? uint16_t(0) : static_cast<const uint16_t*>(x)[at];
      } else {
        c.rest[size_t(at)] = own ? 0.0f : wide[at];
      }
    }
  }
  return same ? static_cast<const void*>(c.rest_halves.data()) : c.rest.data();
}

// The sums of one range of inputs, for outputs [begin, end).
void add_part(const GatherJob& job, const Choice& c, int64_t part, int64_t rows, int64_t begin, int64_t end,
              float* sums) {
  const tt_gather_weight& w = *job.weight;
  const int64_t step = job.step(), first = c.from[part], count = c.from[part + 1] - first;
  for (int64_t b = 0; b < rows; ++b) std::fill(sums + b * step + begin, sums + b * step + end, 0.0f);
  const int64_t block = std::max<int64_t>(kBlockSums / rows / kGatherLanes, 1) * kGatherLanes;
  for (int64_t o = begin; o < end; o += block) {
    job.kernel({w.columns, w.out_features, c.chosen.data() + first, count, c.inputs.data() + first, w.in_features, rows,
                o, std::min(o + block, end), sums, step});
  }
}

thread_local GatherWork planned;

}  // namespace

bool GatherWork::add(const tt_gather_weight& weight, int32_t isa, void* out) {
  const bool factored = weight.rank > 0;
  jobs.push_back({&weight, gather_kernel_for(isa, weight.dtype),
                  factored ? half_kernels_for(isa, weight.factor_dtype == kBfloat16) : nullptr, out});
  return jobs.back().kernel && (!factored || jobs.back().factors);
}

void GatherWork::size(int64_t rows) {
  int64_t total = 0;
  for (const GatherJob& job : jobs) total += kGatherParts * rows * job.step();
  sums.resize(size_t(total));
  while (states.size() < jobs.size()) states.emplace_back();
  for (size_t i = 0; i < jobs.size(); ++i) {
    if (jobs[i].factors) states[i].size(jobs[i].term(), rows);
  }
}

void run_gather(GatherWork& work, const void* x, int32_t dtype, int64_t rows, const Team& team) {
  if (work.jobs.empty()) return;
  Scratch& s = scratch;
  widen(x, dtype, rows * work.jobs[0].weight->in_features, s.wide);
  if (s.choices.size() < work.jobs.size()) s.choices.resize(work.jobs.size());
  // Ranges times slices of the outputs, so many that each thread has as many.
  const int slices = team.count / std::gcd(team.count, kGatherParts);
  const int64_t first = int64_t(kGatherParts) * slices * team.id / team.count;
  const int64_t last = int64_t(kGatherParts) * slices * (team.id + 1) / team.count;
  float* sums = work.sums.data();
  for (size_t i = 0; i < work.jobs.size(); ++i) {
    const GatherJob& job = work.jobs[i];
    const tt_gather_weight& w = *job.weight;
    Choice& c = s.choices[i];
    choose(w, s.wide.data(), rows, c);
    if (job.factors) {
      const void* rest = choose_rest(w, x, dtype, s.wide.data(), rows, c);
      const int32_t rest_dtype = dtype == w.factor_dtype ? dtype : int32_t(kFloat32);
      narrow_inputs(job.term(), work.states[i], rest, rest_dtype, rows, team);
      inner_product(*job.factors, job.term(), work.states[i], rest, rest_dtype, rows, team);
    }
    const int64_t size = rows * job.step(), lanes = w.out_features / kGatherLanes;
    for (int64_t unit = first; unit < last; ++unit) {
      const int64_t part = unit / slices, slice = unit % slices;
      const int64_t begin = lanes * slice / slices * kGatherLanes;
      const int64_t end = slice + 1 == slices ? w.out_features : lanes * (slice + 1) / slices * kGatherLanes;
      add_part(job, c, part, rows, begin, end, sums + part * size);
    }
    sums += kGatherParts * size;
  }
  team.wait();  // for the sums of the others, and the inner products
  sums = work.sums.data();
  for (size_t i = 0; i < work.jobs.size(); ++i) {
    const GatherJob& job = work.jobs[i];
    const int64_t step = job.step(), size = rows * step;
    float* const total = sums;
    each_gather_share({job}, team.id, team.count, [&](const GatherJob&, int64_t begin, int64_t end) {
      for (int64_t b = 0; b < rows; ++b) {
        for (int64_t part = 1; part < kGatherParts; ++part) {
          const float* more = total + part * size + b * step;
          for (int64_t o = begin; o < end; ++o) total[b * step + o] += more[o];
        }
      }
      if (job.factors) {
        add_outer_product(*job.factors, job.term(), work.states[i], total, kFloat32, rows, begin, end);
      }
      for (int64_t b = 0; b < rows; ++b) {
        const int64_t at = b * job.weight->out_features;
        for (int64_t o = begin; o < end; ++o) store_number(job.out, dtype, at + o, total[b * step + o]);
      }
    });
    sums += kGatherParts * size;
  }
}

}  // namespace trimtab

extern "C" int32_t tt_gather_matmul(const tt_gather_weight* weights, int64_t count, const void* x, void* out,
                                    int64_t rows, int32_t dtype, int32_t isa, int32_t threads) {
  using namespace trimtab;
  try {
    GatherWork& work = planned;  // of this thread, not of those that share the work
    work.jobs.clear();
    int64_t outputs = 0, products = 0;
    for (int64_t i = 0; i < count; ++i) {
      const tt_gather_weight& w = weights[i];
      const int64_t number = dtype == kFloat32 ? 4 : 2;
      if (!work.add(w, isa, static_cast<char*>(out) + outputs * rows * number)) return TT_NO_ISA;
      outputs += w.out_features;
      products += w.in_features * w.out_features + w.rank * (w.in_features + w.out_features);
    }
    work.size(rows);
    parallel(products < kSerialProducts ? 1 : threads, [&](int id, int team, auto) {
      run_gather(work, x, dtype, rows, {id, team});
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
