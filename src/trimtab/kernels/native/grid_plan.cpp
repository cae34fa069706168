// Plans: full blocks by chunks, what is left as segments.
#include "grid_plan.h"

#include <algorithm>
#include <limits>

#include "simple.h"

namespace trimtab {
namespace {

// The weights [start, start + capacity) of a row that one block holds.
void add_block_segments(const tt_grid_weight& p, int64_t start, int lanes, int64_t byte, int max_lanes,
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

}  // namespace

Plan make_plan(const tt_grid_weight& p, int max_lanes, bool chunked, std::vector<Segment>& segments) {
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

int64_t row_bytes(const tt_grid_weight& p) {
  const int64_t per_lane = codes_per_lane(p.bits);
  const int64_t blocks = p.in_features / (kLanes * per_lane), rest = p.in_features % (kLanes * per_lane);
  return 2 * words_per_lane(p.bits) * (blocks * kLanes + (rest + per_lane - 1) / per_lane);
}

void load_floats(const Kernels& kernels, int32_t dtype, const void* from, int64_t at, int64_t n, float* to) {
  if (dtype == kFloat32) {
    std::memcpy(to, static_cast<const float*>(from) + at, size_t(n) * 4);
  } else if (dtype == kUint8) {
    kernels.bytes_to_floats(static_cast<const uint8_t*>(from) + at, to, n);
  } else if (dtype == kFloat16) {
    kernels.halves_to_floats(static_cast<const uint16_t*>(from) + at, to, n);
  } else {
    const uint16_t* values = static_cast<const uint16_t*>(from) + at;
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(values[i]);
  }
}

}  // namespace trimtab
