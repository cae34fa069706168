// Panels: some weight rows are written out as bfloat16 where the second-level cache holds them, then multiplied by all
// rows of x. Inputs are cut so that those of one tile stay in the first-level cache for all rows of the panel.
#include <cstring>

#include "grid_job.h"
#include "grid_plan.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kPanelBytes = 192 << 10;  // of written-out rows
constexpr int64_t kPanelRows = 96;
constexpr int64_t kRowStep = 12;            // a whole number of tiles of any width
constexpr int kSecondLevel = 2;             // of the caches, for prefetching
constexpr int64_t kSteps = 64;              // chunks of 32 inputs between two passes over the panel

struct Scratch {
  std::vector<uint16_t> x, weights;
  std::vector<float> sums, parameters;
};
thread_local Scratch scratch;

template <class T>
T* aligned(std::vector<T>& buffer, int64_t count) {
  buffer.resize(size_t(count) + 64 / sizeof(T));
  const uintptr_t at = reinterpret_cast<uintptr_t>(buffer.data());
  return buffer.data() + (64 - at % 64) % 64 / sizeof(T);
}

struct Panel {
  uint16_t* weights;
  int64_t row_step, steps;
  float* sums;  // [batch][kPanelRows]
};

// Writes rows [row, row + count) of a weight to the panel. What is behind their last input stays as it is.
void write_rows(const Call& call, const Job& job, int64_t row, int64_t count, const Panel& panel, float* scales) {
  const tt_grid_weight& weight = *job.weight;
  const int64_t groups = job.plan.groups;
  float* zeros = weight.zeros ? scales + groups : nullptr;
  const HalfRowDecoder decode = call.kernels.halves[1][bits_index(weight.bits)];
  for (int64_t r = 0; r < count; ++r) {
    const int64_t at = (row + r) * groups;
    load_floats(call.kernels, weight.scale_dtype, weight.scales, at, groups, scales);
    if (zeros) load_floats(call.kernels, weight.zero_dtype, weight.zeros, at, groups, zeros);
    decode(job.plan, static_cast<const uint8_t*>(weight.packed) + (row + r) * job.bytes_per_row, scales, zeros,
           weight.levels ? weight.levels + (row + r) * weight.level_step : nullptr, panel.weights + r * panel.row_step);
  }
}

}  // namespace

void run_panels(const Call& call, const std::vector<Job>& jobs, int threads) {
  const int64_t n = call.in_features, steps = (n + kChunk - 1) / kChunk, row_step = (steps + 1) * kChunk;
  const int64_t fitting = kPanelBytes / (2 * row_step) / kRowStep * kRowStep;
  const int64_t panel_rows = std::clamp(fitting, kRowStep, kPanelRows);
  const int64_t tiles = (call.batch + kPanelWidths - 1) / kPanelWidths, cuts = (steps + kSteps - 1) / kSteps;
  uint16_t* const x = aligned(scratch.x, call.batch * steps * kChunk);
  auto first_of = [&](int64_t tile) { return call.batch * tile / tiles; };  // tiles are as equal as can be
  parallel(threads, [&](int id, int count, auto barrier) {
    for (int64_t t = id; t < tiles; t += count) {  // x as [tile][step][width][32], padded with zeros
      const int64_t first = first_of(t), width = first_of(t + 1) - first;
      for (int64_t b = 0; b < width; ++b) {
        const uint16_t* from = reinterpret_cast<const uint16_t*>(call.x) + (first + b) * n;
        uint16_t* to = x + first * steps * kChunk + b * kChunk;
        for (int64_t i = 0; i < n; i += kChunk, to += width * kChunk) {
          const int64_t size = std::min<int64_t>(kChunk, n - i);
          if (size < kChunk) std::memset(to, 0, 2 * kChunk);
          std::memcpy(to, from + i, size_t(size) * 2);
        }
      }
    }
    const Panel panel{aligned(scratch.weights, panel_rows * row_step), row_step, steps,
                      aligned(scratch.sums, call.batch * kPanelRows)};
    for (int64_t r = 0; r < panel_rows; ++r) std::memset(panel.weights + r * row_step + n, 0, size_t(row_step - n) * 2);
    barrier();
    each_share(jobs, id, count, [&](const Job& job, int64_t begin, int64_t end) {
      scratch.parameters.resize(size_t(2 * job.plan.groups));
      for (int64_t row = begin; row < end; row += panel_rows) {
        const int64_t rows = std::min(panel_rows, end - row);
        write_rows(call, job, row, rows, panel, scratch.parameters.data());
        // The packed rows of the next panel come to the cache meanwhile, a share with each tile.
        const uint8_t* ahead = static_cast<const uint8_t*>(job.weight->packed) + (row + rows) * job.bytes_per_row;
        const uint8_t* const ahead_end = ahead + std::min(panel_rows, end - row - rows) * job.bytes_per_row;
        const int64_t share = (ahead_end - ahead) / std::max<int64_t>(1, cuts * tiles * (rows / 4)) + 64;
        for (int64_t cut = 0; cut < cuts; ++cut) {
          const int64_t from = steps * cut / cuts, size = steps * (cut + 1) / cuts - from;
          for (int64_t t = 0; t < tiles; ++t) {
            const int64_t first = first_of(t), width = first_of(t + 1) - first;
            const int together = call.kernels.panel_rows[width - 1];
            for (int64_t r = 0; r < rows;) {
              const bool whole = r + together <= rows;
              (whole ? call.kernels.panels : call.kernels.panel_single)[width - 1](
                  {panel.weights + r * row_step + from * kChunk, row_step,
                   x + (first * steps + from * width) * kChunk, size, panel.sums + first * kPanelRows + r, kPanelRows,
                   cut > 0});
              r += whole ? together : 1;
              const uint8_t* const stop = std::min(ahead + share, ahead_end);
              for (; ahead < stop; ahead += 64) __builtin_prefetch(ahead, 0, kSecondLevel);
            }
          }
        }
        for (int64_t b = 0; b < call.batch; ++b) {
          call.kernels.floats_to_bfloats(panel.sums + b * kPanelRows,
                                         static_cast<uint16_t*>(job.out) + b * job.weight->out_features + row, rows);
        }
      }
    });
  });
}

}  // namespace trimtab
