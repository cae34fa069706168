// One call of grid_matmul: what is common, and one weight of it.
#pragma once

#include <algorithm>
#include <vector>

#include "api.h"
#include "grid_matmul.h"
#include "threads.h"

namespace trimtab {

struct Call {
  const Kernels& kernels;
  const uint8_t* x;
  int32_t dtype;  // of x and the outputs
  int64_t batch, in_features;
};

// Inputs of one tile of batch rows, as Tile wants them.
struct Inputs {
  const void *blocks, *rest;
  const float* sums;
};

struct Job {
  const tt_grid_weight* weight;
  Plan plan;
  int64_t bytes_per_row;
  bool wants_sums;
  void* out;
  const Job* like;             // the first job that wants the inputs laid out as this one does
  uint8_t* scratch;            // of its inputs, if that is this one
  bool as_they_are;            // its inputs are read where they are: nothing to lay out
  std::vector<Inputs> inputs;  // by tile

  int64_t head() const { return plan.blocks * kLanes * codes_per_lane(weight->bits); }  // inputs of the full blocks
  bool shares_inputs(const Job& other) const {
    return head() == other.head() && wants_sums == other.wants_sums &&
           (!wants_sums || weight->group_size == other.weight->group_size);
  }
};

// Calls f(job, first row, end) for the rows of one of `count` threads. The rows of all weights are one list of work, of
// which each thread takes an equal share of bytes.
template <class F>
void each_share(const std::vector<Job>& jobs, int id, int count, F&& f) {
  int64_t total = 0, start = 0;
  for (const Job& job : jobs) total += job.weight->out_features * job.bytes_per_row;
  for (const Job& job : jobs) {
    const int64_t bytes = job.bytes_per_row, outputs = job.weight->out_features;
    auto first_row_from = [&](int64_t at) { return std::clamp<int64_t>((at - start + bytes - 1) / bytes, 0, outputs); };
    const int64_t begin = first_row_from(total * id / count), end = first_row_from(total * (id + 1) / count);
    start += outputs * bytes;
    if (begin < end) f(job, begin, end);
  }
}

// The products of one x with several weights, planned by one thread and computed by a team. Kept between calls: planning
// allocates nothing once the sizes have been seen.
struct Products {
  std::vector<Job> jobs;
  std::vector<std::vector<Segment>> segments;
  std::vector<uint8_t> inputs;

  void size(size_t count) {
    jobs.resize(count);
    segments.resize(std::max(segments.size(), count));
  }
};

// One product of those that `size` has made room for; out is [batch][out].
void plan_job(Products& products, const Call& call, size_t index, const tt_grid_weight& weight, void* out);

// After all jobs are planned: gives the inputs of those that differ in them a place each.
void place_inputs(Products& products, const Call& call);

// Multiplies packed rows as they are: called by every thread of the team, which waits if there are inputs to lay out. The
// rows that `each_share` names for a thread are written by it.
void run_packed(const Call& call, Products& products, const Team& team);

// Writes rows out as bfloat16 in a cache and multiplies them: for kernels that have `panels`.
void run_panels(const Call& call, const std::vector<Job>& jobs, int threads);

}  // namespace trimtab
