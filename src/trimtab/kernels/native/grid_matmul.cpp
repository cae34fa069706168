// The work of one grid_matmul: prepare the inputs, cut outputs and batch into tiles, share them among threads.
#include "grid_matmul.h"

#include <algorithm>
#include <limits>
#include <new>
#include <vector>

#include "api.h"
#include "simple.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kPanelBytes = 256 << 10;      // packed rows that stay in the second-level cache between batch tiles
constexpr int64_t kSerialProducts = 1 << 17;    // below this, starting threads costs more than they save

// The weights [start, start + capacity) of a row that one block holds.
void add_block_segments(const tt_grid_problem& p, int64_t start, int lanes, int64_t byte, int max_lanes,
                        int64_t rest_start, std::vector<Segment>& out) {
  const int64_t group = p.group_size;
  for (int k = 0; k < codes_per_lane(p.bits); ++k) {
    const int64_t first = start + int64_t(k) * lanes, end = std::min<int64_t>(first + lanes, p.in_features);
    const bool top = p.bits == 3 && k == 15;
    const int plane = p.bits == 3 && !top ? k / 5 : 0;
    for (int64_t i = first; i < end;) {
      const int64_t g = i / group;
      const int64_t stop = std::min({end, i + max_lanes, (g + 1) * group});
      Segment s;
      s.byte_offset = int32_t(byte + 2 * (int64_t(plane) * lanes + (i - first)));
      s.plane_bytes = 2 * lanes;
      s.shift = top ? -1 : p.bits * (p.bits == 3 ? k % 5 : k);
      s.count = int32_t(stop - i);
      s.x_offset = int32_t(i - rest_start);
      s.group = int32_t(g);
      s.ends_group = stop == (g + 1) * group;
      out.push_back(s);
      i = stop;
    }
  }
}

// `chunked`: walk full blocks by chunks where groups allow it; else all is segments.
Plan make_plan(const tt_grid_problem& p, int max_lanes, bool chunked, std::vector<Segment>& segments) {
  const int64_t per_block = int64_t(kLanes) * codes_per_lane(p.bits);
  const int64_t block_bytes = 2 * kLanes * words_per_lane(p.bits);
  const int64_t blocks = p.in_features / per_block, groups = p.in_features / p.group_size;
  const bool whole_chunks = chunked && (groups == 1 || p.group_size % kChunk == 0);
  Plan plan{};
  plan.blocks = whole_chunks ? blocks : 0;
  plan.chunks_per_group = groups == 1 ? std::numeric_limits<int64_t>::max() : p.group_size / kChunk;
  plan.groups = groups;
  segments.clear();
  const int64_t rest_start = plan.blocks * per_block;
  for (int64_t b = plan.blocks; b < blocks; ++b) {
    add_block_segments(p, b * per_block, kLanes, b * block_bytes, max_lanes, rest_start, segments);
  }
  if (const int64_t rest = p.in_features - blocks * per_block) {
    const int lanes = int((rest + codes_per_lane(p.bits) - 1) / codes_per_lane(p.bits));
    add_block_segments(p, blocks * per_block, lanes, blocks * block_bytes, max_lanes, rest_start, segments);
  }
  plan.segments = segments.data();
  plan.segment_count = int64_t(segments.size());
  return plan;
}

int64_t row_bytes(const tt_grid_problem& p) {
  const int64_t per_lane = codes_per_lane(p.bits);
  const int64_t blocks = p.in_features / (kLanes * per_lane), rest = p.in_features % (kLanes * per_lane);
  return 2 * words_per_lane(p.bits) * (blocks * kLanes + (rest + per_lane - 1) / per_lane);
}

void load_floats(const Kernels& kernels, int32_t dtype, const void* from, int64_t at, int64_t n, float* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + at, size_t(n) * 4);
  } else if (dtype == kFloat16) {
    kernels.halves_to_floats(static_cast<const uint16_t*>(from) + at, to, n);
  } else {
    const uint16_t* values = static_cast<const uint16_t*>(from) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(values[i]);
  }
}

void store_float(int32_t dtype, void* out, int64_t at, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<uint16_t*>(out)[at] = dtype == kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
  }
}

// Inputs of one tile of batch rows, as Tile wants them.
struct Inputs {
  const void *blocks, *rest;
  const float* sums;
};

struct Job {
  const tt_grid_problem& problem;
  const Kernels& kernels;
  Plan plan;
  const uint8_t* x;
  const uint8_t* packed;
  const void* scales;
  const uint8_t* zeros;
  void* out;
  int64_t batch;
  int64_t bytes_per_row;

  int64_t head() const { return plan.blocks * kLanes * codes_per_lane(problem.bits); }  // inputs of the full blocks
  int64_t element() const { return kernels.bfloat16_inputs ? 2 : 4; }
  // Scratch bytes per batch row: inputs, then sums.
  int64_t input_bytes() const { return (problem.in_features * element() + 63) / 64 * 64; }
  int64_t sum_bytes() const { return wants_sums() ? (plan.groups * 4 + 63) / 64 * 64 : 0; }
  bool wants_sums() const { return kernels.wants_sums && zeros; }
};

int width_index(int64_t remaining) { return remaining >= 8 ? 3 : remaining >= 4 ? 2 : remaining >= 2 ? 1 : 0; }

// Lay out the inputs of `width` batch rows from row `first`.
Inputs prepare(const Job& job, int64_t first, int width, uint8_t* scratch, std::vector<float>& row) {
  const int64_t n = job.problem.in_features, head = job.head(), rest = n - head;
  float* sums = job.wants_sums() ? reinterpret_cast<float*>(scratch + width * job.input_bytes()) : nullptr;
  if (job.kernels.bfloat16_inputs) {
    const uint16_t* x = reinterpret_cast<const uint16_t*>(job.x) + first * n;
    for (int b = 0; sums && b < width; ++b) {
      job.kernels.group_sums(x + b * n, job.problem.group_size, job.plan.groups, sums + b * job.plan.groups);
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
    load_floats(job.kernels, job.problem.x_dtype, job.x, (first + b) * n, n, row.data());
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
void run_rows(const Job& job, const Inputs& inputs, int64_t first, int index, int64_t begin, int64_t end,
              std::vector<float>& parameters) {
  const tt_grid_problem& p = job.problem;
  const int64_t groups = job.plan.groups;
  const int width = kWidths[index], rows = job.kernels.tile_rows[index], bits = bits_index(p.bits);
  parameters.resize(size_t(2 * rows * groups));
  float out[kMaxTileRows * 8];
  Tile tile;
  tile.plan = &job.plan;
  tile.scales = parameters.data();
  tile.zeros = job.zeros ? parameters.data() + rows * groups : nullptr;
  tile.x_blocks = inputs.blocks;
  tile.x_rest = inputs.rest;
  tile.rest = p.in_features - job.head();
  tile.x_sums = inputs.sums;
  tile.out = out;
  auto run = [&](TileKernel kernel, int64_t row, int count, int64_t apart) {
    for (int r = 0; r < count; ++r) {
      const int64_t at = (row + r * apart) * groups;
      load_floats(job.kernels, p.scale_dtype, job.scales, at, groups, parameters.data() + r * groups);
      if (job.zeros) job.kernels.bytes_to_floats(job.zeros + at, parameters.data() + (rows + r) * groups, groups);
    }
    const int64_t parameter_bytes = groups * (p.scale_dtype == kFloat32 ? 4 : 2);
    for (int r = 0; r < count; ++r) {  // of the next tile, so that it need not wait for them
      const char* next = static_cast<const char*>(job.scales) + (row + 1 + r * apart) * parameter_bytes;
      for (int64_t i = 0; i < parameter_bytes; i += 64) __builtin_prefetch(next + i);
      if (!job.zeros) continue;
      for (int64_t i = 0; i < groups; i += 64) __builtin_prefetch(job.zeros + (row + 1 + r * apart) * groups + i);
    }
    tile.packed = job.packed + row * job.bytes_per_row;
    tile.row_step = apart * job.bytes_per_row;
    kernel(tile);
    for (int r = 0; r < count; ++r) {
      for (int b = 0; b < width; ++b) {
        store_float(p.x_dtype, job.out, (first + b) * p.out_features + row + r * apart, out[r * width + b]);
      }
    }
  };
  const int64_t apart = (end - begin) / rows;
  for (int64_t i = 0; i < apart; ++i) run(job.kernels.tiles[bits][index], begin + i, rows, apart);
  for (int64_t row = begin + apart * rows; row < end; ++row) run(job.kernels.single[bits][index], row, 1, 0);
}

struct Scratch {
  std::vector<uint8_t> inputs;
  std::vector<Segment> segments;
  std::vector<float> row, parameters;
};
thread_local Scratch scratch;  // kept between calls: a call allocates nothing once the sizes have been seen

void run_job(const Job& job, int threads) {
  const int64_t tiles_of_8 = job.batch / 8, tail = job.batch % 8;
  const int64_t tiles = tiles_of_8 + (tail >> 2 & 1) + (tail >> 1 & 1) + (tail & 1);
  const int64_t bytes = job.batch * (job.input_bytes() + job.sum_bytes());
  scratch.inputs.resize(size_t(bytes + 64));
  uint8_t* base = scratch.inputs.data();
  base += (64 - reinterpret_cast<uintptr_t>(base) % 64) % 64;
  std::vector<Inputs> inputs(static_cast<size_t>(tiles));
  parallel(threads, [&](int id, int count, auto barrier) {
    auto each_tile = [&](auto&& f) {
      int64_t first = 0;
      for (int64_t t = 0; t < tiles; ++t) {
        const int index = width_index(job.batch - first);
        f(t, first, index);
        first += kWidths[index];
      }
    };
    each_tile([&](int64_t t, int64_t first, int index) {
      if (t % count != id) return;
      uint8_t* at = base + first * (job.input_bytes() + job.sum_bytes());
      inputs[size_t(t)] = prepare(job, first, kWidths[index], at, scratch.row);
    });
    barrier();
    const int64_t begin = job.problem.out_features * id / count, end = job.problem.out_features * (id + 1) / count;
    const int64_t panel = tiles == 1 ? end - begin : std::max<int64_t>(8, kPanelBytes / job.bytes_per_row / 8 * 8);
    for (int64_t row = begin; row < end; row += panel) {
      each_tile([&](int64_t t, int64_t first, int index) {
        run_rows(job, inputs[size_t(t)], first, index, row, std::min(row + panel, end), scratch.parameters);
      });
    }
  });
}

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_grid_matmul(const tt_grid_problem* problem, const void* x, const void* packed,
                                  const void* scales, const void* zeros, void* out, int64_t batch, int32_t threads) {
  using namespace trimtab;
  const tt_grid_problem& p = *problem;
  const Kernels* kernels = kernels_for(p.isa, p.x_dtype == kBfloat16);
  if (!kernels) return TT_NO_ISA;
  try {
    const Plan plan = make_plan(p, kernels->segment_lanes, true, scratch.segments);
    const Job job{p,      *kernels, plan, static_cast<const uint8_t*>(x), static_cast<const uint8_t*>(packed),
                  scales, static_cast<const uint8_t*>(zeros), out, batch, row_bytes(p)};
    const bool serial = batch * p.out_features * p.in_features < kSerialProducts;
    run_job(job, serial ? 1 : threads);
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}

extern "C" int32_t tt_grid_dequantize(const tt_grid_problem* problem, const void* packed, const void* scales,
                                      const void* zeros, void* out, int64_t rows, int32_t threads) {
  using namespace trimtab;
  const tt_grid_problem& p = *problem;
  const Kernels* kernels = kernels_for(p.isa, false);
  if (!kernels) return TT_NO_ISA;
  try {
    const Plan plan = make_plan(p, kernels->segment_lanes, false, scratch.segments);
    const int64_t bytes = row_bytes(p), n = p.in_features;
    const bool serial = rows * n < kSerialProducts;
    parallel(serial ? 1 : threads, [&](int id, int count, auto) {
      scratch.parameters.resize(size_t(2 * plan.groups));
      scratch.row.resize(size_t(n));
      float* values = scratch.row.data();
      float* zero = zeros ? scratch.parameters.data() + plan.groups : nullptr;
      for (int64_t row = rows * id / count; row < rows * (id + 1) / count; ++row) {
        load_floats(*kernels, p.scale_dtype, scales, row * plan.groups, plan.groups, scratch.parameters.data());
        if (zero) {
          kernels->bytes_to_floats(static_cast<const uint8_t*>(zeros) + row * plan.groups, zero, plan.groups);
        }
        float* to = p.x_dtype == kFloat32 ? static_cast<float*>(out) + row * n : values;
        kernels->rows[bits_index(p.bits)](plan, static_cast<const uint8_t*>(packed) + row * bytes,
                                          scratch.parameters.data(), zero, to);
        if (p.x_dtype == kBfloat16) {
          kernels->floats_to_bfloats(values, static_cast<uint16_t*>(out) + row * n, n);
        } else if (p.x_dtype == kFloat16) {
          for (int64_t i = 0; i < n; ++i) store_float(kFloat16, out, row * n + i, values[i]);
        }
      }
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
