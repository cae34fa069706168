// gather_matmul: out[b][o] = sum of x[b][j] * column[j][o] over the inputs j that count, plus left (right x) of the others.
//
// tt_gather_weight (api.h) says how a weight is stored and what counts. gather_matmul.cpp chooses the columns; a
// GatherKernel (one per instruction set and dtype, from gather_tile.h) adds them, several at a time, so that a sum in the
// cache is read and written once for all of them. The inputs are cut into kGatherParts ranges with sums of their own, which
// are then added in their order: threads that share a weight take ranges, and read whole columns. A sum depends on the
// choice alone.
#pragma once

#include <cstdint>
#include <deque>
#include <vector>

#include "api.h"
#include "low_rank.h"
#include "threads.h"

namespace trimtab {

constexpr int kGatherLanes = 64;  // begin is a multiple of it, and the sums of a row have room for one
constexpr int kGatherParts = 4;

struct GatherTile {
  const void* columns;     // [in][out]
  int64_t column_step;     // out
  const int32_t* chosen;   // [count]
  int64_t count;
  const float* x;          // [width][x_step], the inputs of the chosen columns
  int64_t x_step, width;
  int64_t begin, end;      // outputs
  float* sums;             // [width][sums_step]
  int64_t sums_step;
};

using GatherKernel = void (*)(const GatherTile&);

// By the dtype of the columns. Null where the compiler could not. The caller has checked that the machine can.
GatherKernel gather_scalar(int32_t dtype);
GatherKernel gather_avx2(int32_t dtype);
GatherKernel gather_avx512(int32_t dtype);

// One weight of a call; out is [rows][out] of the dtype of x.
struct GatherJob {
  const tt_gather_weight* weight;
  GatherKernel kernel;
  const HalfKernels* factors;  // of the low-rank term, if there is one
  void* out;

  int64_t step() const { return (weight->out_features / kGatherLanes + 1) * kGatherLanes; }  // of a row of sums
  LowRank term() const {
    return {static_cast<const uint16_t*>(weight->right), static_cast<const uint16_t*>(weight->left), weight->in_features,
            step(), weight->rank, weight->factor_dtype};
  }
};

// The weights of a call, and what the team shares while it multiplies by them. Kept between calls.
struct GatherWork {
  std::vector<GatherJob> jobs;
  std::deque<LowRankState> states;  // of each job
  std::vector<float> sums;          // of each job [kGatherParts][rows][step]

  // Adds a weight; false if there is no kernel for it.
  bool add(const tt_gather_weight& weight, int32_t isa, void* out);
  // Before the team starts, after the last `add`.
  void size(int64_t rows);
};

// Calls f(job, first output, end) for the outputs of one of `count` threads.
template <class F>
void each_gather_share(const std::vector<GatherJob>& jobs, int id, int count, F&& f) {
  for (const GatherJob& job : jobs) {
    const int64_t outputs = job.weight->out_features, lanes = outputs / kGatherLanes;
    const int64_t begin = lanes * id / count * kGatherLanes;
    const int64_t end = id + 1 == count ? outputs : lanes * (id + 1) / count * kGatherLanes;
    if (begin < end) f(job, begin, end);
  }
}

// Multiplies: called by every thread of the team, for which it waits inside. The outputs that `each_gather_share` names
// for a thread are written by it.
void run_gather(GatherWork& work, const void* x, int32_t dtype, int64_t rows, const Team& team);

}  // namespace trimtab
