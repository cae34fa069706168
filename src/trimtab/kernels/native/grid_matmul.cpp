// The work of one grid_matmul: prepare the inputs, cut outputs and batch into tiles, share them among threads.
#include <algorithm>
#include <new>
#include <vector>

#include "grid_job.h"
#include "grid_plan.h"
#include "simple.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kPanelBytes = 256 << 10;      // packed rows that stay in the second-level cache between batch tiles
constexpr int64_t kPackedBatch = 12;            // above this, panels are faster; by measurement
constexpr int64_t kSerialProducts = 1 << 17;    // below this, starting threads costs more than they save

void store_float(int32_t dtype, void* out, int64_t at, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<uint16_t*>(out)[at] = dtype == kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
  }
}

// Scratch bytes of one batch row: inputs, then sums.
int64_t input_bytes(const Call& call) {
  return (call.in_features * (call.kernels.bfloat16_inputs ? 2 : 4) + 63) / 64 * 64;
}
int64_t sum_bytes(const Job& job) { return job.wants_sums ? (job.plan.groups * 4 + 63) / 64 * 64 : 0; }

int width_index(int64_t remaining) { return remaining >= 8 ? 3 : remaining >= 4 ? 2 : remaining >= 2 ? 1 : 0; }

// Lay out the inputs of `width` batch rows from row `first`.
Inputs prepare(const Call& call, const Job& job, int64_t first, int width, uint8_t* scratch, std::vector<float>& row) {
  const int64_t n = call.in_features, head = job.head(), rest = n - head;
  float* sums = job.wants_sums ? reinterpret_cast<float*>(scratch + width * input_bytes(call)) : nullptr;
  if (call.kernels.bfloat16_inputs) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(call.x) + first * n;
    for (int b = 0; sums && b < width; ++b) {
      call.kernels.group_sums(x + b * n, job.weight->group_size, job.plan.groups, sums + b * job.plan.groups);
    }
    if (width == 1) return {x, x + head, sums};
    uint16_t* to = reinterpret_cast<uint16_t*>(scratch);
    for (int b = 0; b < width; ++b) {
      for (int64_t c = 0; c < head / kChunk; ++c) {
        std::memcpy(to + (c * width + b) * kChunk, x + b * n + c * kChunk, 2 * kChunk);
      }
      if (rest) std::memcpy(to + width * head + b * rest, x + b * n + head, size_t(rest) * 2);
    }
    return {to, to + width * head, sums};
  }
  float* to = reinterpret_cast<float*>(scratch);
  row.resize(size_t(n));
  for (int b = 0; b < width; ++b) {
    load_floats(call.kernels, call.dtype, call.x, (first + b) * n, n, row.data());
    for (int64_t c = 0; c < head / kChunk; ++c) {
      float* chunk = to + (c * width + b) * kChunk;
      for (int i = 0; i < kChunk / 2; ++i) {
        chunk[i] = row[size_t(c * kChunk + 2 * i)];
        chunk[kChunk / 2 + i] = row[size_t(c * kChunk + 2 * i + 1)];
      }
    }
    if (rest) std::memcpy(to + width * head + b * rest, row.data() + head, size_t(rest) * 4);
  }
  return {to, to + width * head, nullptr};
}

// Outputs [begin, end) of the batch rows of one tile. The rows of a tile lie far apart, so that each of its memory
// streams is as long as the panel allows.
void run_rows(const Call& call, const Job& job, const Inputs& inputs, int64_t first, int index, int64_t begin,
              int64_t end, std::vector<float>& parameters) {
  const tt_grid_weight& weight = *job.weight;
  const int64_t groups = job.plan.groups;
  const int width = kWidths[index], rows = call.kernels.tile_rows[index], bits = bits_index(weight.bits);
  const int64_t scale_bytes = groups * dtype_bytes(weight.scale_dtype);
  const int64_t zero_bytes = groups * dtype_bytes(weight.zero_dtype);
  parameters.resize(size_t(2 * rows * groups));
  float* const scales = parameters.data();
  float* const zeros = weight.zeros ? scales + rows * groups : nullptr;
  float out[kMaxTileRows * 8];
  Tile tile;
  tile.plan = &job.plan;
  tile.scales = scales;
  tile.zeros = zeros;
  tile.x_blocks = inputs.blocks;
  tile.x_rest = inputs.rest;
  tile.rest = call.in_features - job.head();
  tile.x_sums = inputs.sums;
  tile.out = out;
  auto prefetch = [](const void* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(static_cast<const char*>(from) + i);
  };
  auto run = [&](TileKernel kernel, int64_t row, int count, int64_t apart) {
    for (int r = 0; r < count; ++r) {
      const int64_t at = (row + r * apart) * groups;
      load_floats(call.kernels, weight.scale_dtype, weight.scales, at, groups, scales + r * groups);
      if (zeros) load_floats(call.kernels, weight.zero_dtype, weight.zeros, at, groups, zeros + r * groups);
    }
    for (int r = 0; r < count; ++r) {  // of the next tile, so that it need not wait for them
      const int64_t next = row + 1 + r * apart;
      prefetch(static_cast<const char*>(weight.scales) + next * scale_bytes, scale_bytes);
      if (zeros) prefetch(static_cast<const char*>(weight.zeros) + next * zero_bytes, zero_bytes);
    }
    tile.packed = static_cast<const uint8_t*>(weight.packed) + row * job.bytes_per_row;
    tile.row_step = apart * job.bytes_per_row;
    tile.levels = weight.levels ? weight.levels + row * weight.level_step : nullptr;
    tile.level_step = apart * weight.level_step;
    kernel(tile);
    for (int r = 0; r < count; ++r) {
      for (int b = 0; b < width; ++b) {
        store_float(call.dtype, job.out, (first + b) * weight.out_features + row + r * apart, out[r * width + b]);
      }
    }
  };
  const int64_t apart = (end - begin) / rows;
  for (int64_t i = 0; i < apart; ++i) run(call.kernels.tiles[bits][index], begin + i, rows, apart);
  for (int64_t row = begin + apart * rows; row < end; ++row) run(call.kernels.single[bits][index], row, 1, 0);
}

struct Scratch {
  std::vector<float> row, parameters;
};
thread_local Scratch scratch;
thread_local Products products;

// Calls f(tile, first batch row, index of its width) for each tile of batch rows.
template <class F>
void each_tile(int64_t batch, F&& f) {
  int64_t tile = 0;
  for (int64_t first = 0; first < batch; ++tile) {
    const int index = width_index(batch - first);
    f(tile, first, index);
    first += kWidths[index];
  }
}

}  // namespace

void plan_job(Products& products, const Call& call, size_t index, const tt_grid_weight& weight, void* out) {
  Job& job = products.jobs[index];
  job.weight = &weight;
  job.plan = make_plan(weight, call.kernels.segment_lanes, true, products.segments[index]);
  job.bytes_per_row = row_bytes(weight);
  job.wants_sums = call.kernels.wants_sums && weight.zeros;
  job.out = out;
}

void place_inputs(Products& products, const Call& call) {
  std::vector<Job>& jobs = products.jobs;
  int64_t tiles = 0, scratch_bytes = 64;
  each_tile(call.batch, [&](int64_t, int64_t, int) { ++tiles; });
  for (Job& job : jobs) {
    job.like = &*std::find_if(jobs.begin(), jobs.end(), [&](const Job& other) { return job.shares_inputs(other); });
    if (job.like == &job) scratch_bytes += call.batch * (input_bytes(call) + sum_bytes(job));
  }
  products.inputs.resize(size_t(scratch_bytes));
  uint8_t* place = products.inputs.data();
  place += (64 - reinterpret_cast<uintptr_t>(place) % 64) % 64;
  for (Job& job : jobs) {
    if (job.like != &job) continue;
    job.inputs.resize(size_t(tiles));
    job.scratch = place;
    job.as_they_are = call.kernels.bfloat16_inputs && call.batch == 1 && !job.wants_sums;
    if (job.as_they_are) job.inputs[0] = prepare(call, job, 0, 1, place, scratch.row);  // which only points there
    place += call.batch * (input_bytes(call) + sum_bytes(job));
  }
}

void run_packed(const Call& call, Products& products, const Team& team) {
  int64_t tiles = 0;
  each_tile(call.batch, [&](int64_t, int64_t, int) { ++tiles; });
  bool laid_out = false;
  for (Job& job : products.jobs) {
    if (job.like != &job || job.as_they_are) continue;
    laid_out = true;
    each_tile(call.batch, [&](int64_t t, int64_t first, int index) {
      if (t % team.count != team.id) return;
      uint8_t* at = job.scratch + first * (input_bytes(call) + sum_bytes(job));
      job.inputs[size_t(t)] = prepare(call, job, first, kWidths[index], at, scratch.row);
    });
  }
  if (laid_out) team.wait();
  each_share(products.jobs, team.id, team.count, [&](const Job& job, int64_t begin, int64_t end) {
    const int64_t panel = tiles == 1 ? end - begin : std::max<int64_t>(8, kPanelBytes / job.bytes_per_row / 8 * 8);
    for (int64_t row = begin; row < end; row += panel) {
      each_tile(call.batch, [&](int64_t t, int64_t first, int index) {
        const Inputs& inputs = job.like->inputs[size_t(t)];
        run_rows(call, job, inputs, first, index, row, std::min(row + panel, end), scratch.parameters);
      });
    }
  });
}

}  // namespace trimtab

extern "C" int32_t tt_grid_matmul(const tt_grid_weight* weights, int64_t count, const void* x, void* out, int64_t batch,
                                  int32_t dtype, int32_t isa, int32_t threads) {
  using namespace trimtab;
  const Kernels* kernels = kernels_for(isa, dtype == kBfloat16);
  if (!kernels) return TT_NO_ISA;
  try {
    const Call call{*kernels, static_cast<const uint8_t*>(x), dtype, batch, weights[0].in_features};
    Products& planned = products;  // of this thread, not of those that share the work
    planned.size(size_t(count));
    int64_t outputs = 0;
    for (int64_t i = 0; i < count; ++i) {
      void* own = static_cast<uint8_t*>(out) + outputs * batch * dtype_bytes(dtype);
      plan_job(planned, call, size_t(i), weights[i], own);
      outputs += weights[i].out_features;
    }
    const bool serial = batch * outputs * call.in_features < kSerialProducts;
    if (batch > kPackedBatch && kernels->panels[0]) {
      run_panels(call, planned.jobs, serial ? 1 : threads);
    } else {
      place_inputs(planned, call);
      parallel(serial ? 1 : threads, [&](int id, int team, auto) { run_packed(call, planned, {id, team}); });
    }
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
