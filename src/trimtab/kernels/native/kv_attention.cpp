// Work of kv_attention, cut into items and merged; see kv_attention.h.
#include "kv_attention.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <limits>
#include <new>

#include "grid_matmul.h"
#include "simple.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kChunk = 1024, kChunkOfAllHeads = 512;  // tokens of an item
constexpr int64_t kItemQueries = 32;                      // queries of an item and head
constexpr int64_t kSerialProducts = int64_t(1) << 17;     // below, waking threads costs more than they save
constexpr float kHidden = -std::numeric_limits<float>::infinity();

struct Cut {  // how a lane is cut into items
  int64_t chunk, chunks, heads_together, query_blocks, first_item, first_part;
};

struct Job {
  const tt_kv_problem& problem;
  const tt_kv_lane* lanes;
  const int64_t* heads;
  const KvRun* runs;
  const KvKernels& kernels;
  const Cut* cuts;
  float* parts;  // of each lane [head][query][chunk]: maximum, sum, weighted values [dim]

  int64_t queries() const { return problem.group * problem.length; }
  int64_t part_size() const { return problem.head_dim + 2; }
  // Query i of a KV head: head of the model and place in the length.
  int64_t query_head(const tt_kv_lane& lane, int64_t h, int64_t i) const {
    return heads[lane.heads_at + h] * problem.group + i / problem.length;
  }
  int64_t place(int64_t i) const { return i % problem.length; }
};

const KvKernels* kernels_of(int32_t isa, int32_t dtype) {
  const bool best = isa == TT_ISA_BEST;
  if (dtype != kFloat32 && (best || isa >= TT_ISA_AVX512_BF16)) {
    if (const KvKernels* kernels = kv_avx512_vnni_kernels()) return kernels;
  }
  if (best || isa >= TT_ISA_AVX512) {
    if (const KvKernels* kernels = kv_avx512_kernels()) return kernels;
  }
  if (best || isa >= TT_ISA_AVX2) {
    if (const KvKernels* kernels = kv_avx2_kernels()) return kernels;
  }
  return kv_scalar_kernels();
}

int32_t check(const tt_kv_problem& p, const tt_kv_lane& lane, const KvRun* runs) {
  auto covers = [&](int64_t at, int64_t count) {
    int64_t tokens = 0;
    for (int64_t i = at; i < at + count; ++i) {
      if (runs[i].heads != lane.heads || runs[i].head_dim != p.head_dim) return false;
      tokens += runs[i].tokens;
    }
    return tokens == lane.tokens;
  };
  if (!covers(lane.keys_at, lane.keys) || !covers(lane.values_at, lane.values)) return TT_BAD_LANE;
  for (int64_t i = lane.keys_at; i < lane.keys_at + lane.keys; ++i) {
    if (runs[i].first_position >= 0 && runs[i].first_position + runs[i].tokens > p.rope_positions) return TT_BAD_POSITION;
  }
  return TT_OK;
}

Cut cut(const tt_kv_problem& p, const tt_kv_lane& lane, const KvRun* runs) {
  bool together = false;
  for (int64_t i = lane.keys_at; i < lane.keys_at + lane.keys; ++i) together |= wants_all_heads(runs[i]);
  for (int64_t i = lane.values_at; i < lane.values_at + lane.values; ++i) together |= mixes_heads(runs[i]);
  const int64_t chunk = together ? kChunkOfAllHeads : kChunk;
  return {chunk, (lane.tokens + chunk - 1) / chunk, together ? lane.heads : 1,
          (p.group * p.length + kItemQueries - 1) / kItemQueries, 0, 0};
}

// f(run, its tokens [begin, end), place in the chunk) for the runs that meet tokens [begin, end) of the lane.
template <class F>
void each_run(const KvRun* runs, int64_t count, int64_t begin, int64_t end, F&& f) {
  int64_t start = 0;
  for (int64_t i = 0; i < count && start < end; start += runs[i++].tokens) {
    const int64_t from = std::max(begin, start), to = std::min(end, start + runs[i].tokens);
    if (from < to) f(runs[i], from - start, to - start, from - begin);
  }
}

void run_item(const Job& job, const tt_kv_lane& lane, const Cut& cut, int64_t index, KvScratch& scratch) {
  const tt_kv_problem& p = job.problem;
  const int64_t chunk = index % cut.chunks, block = index / cut.chunks % cut.query_blocks;
  const int64_t first_query = block * kItemQueries, dim = p.head_dim;
  KvItem item;
  item.dim = dim;
  item.heads = cut.heads_together;
  item.first_head = index / cut.chunks / cut.query_blocks * cut.heads_together;
  item.count = std::min(kItemQueries, job.queries() - first_query);
  item.cos = static_cast<const float*>(p.cos);
  item.sin = static_cast<const float*>(p.sin);
  item.half = p.rope_half;
  item.scratch = &scratch;

  int64_t begin = chunk * cut.chunk;
  const int64_t end = std::min(lane.tokens, begin + cut.chunk), all = item.heads * item.count;
  const int64_t* first_visible = static_cast<const int64_t*>(p.first_visible);
  if (first_visible) {  // tokens that no query sees are left out
    first_visible += lane.row * p.length;
    begin = std::min(end, std::max(begin, *std::min_element(first_visible, first_visible + p.length)));
  }
  auto part = [&](int64_t h, int64_t i) {
    const int64_t at = ((item.first_head + h) * job.queries() + first_query + i) * cut.chunks + chunk;
    return job.parts + (cut.first_part + at) * job.part_size();
  };
  if (begin == end) {
    for (int64_t i = 0; i < all; ++i) {
      float* to = part(i / item.count, i % item.count);
      to[0] = kHidden;
      to[1] = 0;
    }
    return;
  }
  const int64_t floats = all * dim;
  item.pitch = (end - begin + 31) / 32 * 32;
  item.lanes = scratch.item.take(floats * (job.kernels.width + 2) + all * item.pitch);
  item.scores = item.lanes + floats * job.kernels.width;
  item.queries = item.scores + all * item.pitch;
  item.sums = item.queries + floats;
  std::fill(item.lanes, item.lanes + floats * job.kernels.width, 0.0f);
  std::fill(item.sums, item.sums + floats, 0.0f);
  for (int64_t i = 0; i < all; ++i) {
    const int64_t query = first_query + i % item.count;
    const int64_t at = lane.row * p.query_row_step + job.place(query) * p.query_step +
                       job.query_head(lane, item.first_head + i / item.count, query) * p.query_head_step;
    const uint8_t* from = static_cast<const uint8_t*>(p.query) + at * (p.dtype == kFloat32 ? 4 : 2);
    job.kernels.to_floats(p.dtype, from, dim, item.queries + i * dim);
  }
  each_run(job.runs + lane.keys_at, lane.keys, begin, end, [&](const KvRun& run, int64_t from, int64_t to, int64_t at) {
    job.kernels.keys(item, run, from, to, at);
  });
  for (int64_t i = 0; i < all; ++i) {
    const int64_t query = first_query + i % item.count, place = job.place(query);
    KvSoftmax s{p.scale, p.softcap, nullptr, end - begin, 0, nullptr, 0};
    if (p.bias) {
      s.bias = static_cast<const float*>(p.bias) + lane.row * p.bias_row_step + begin +
               job.query_head(lane, item.first_head + i / item.count, query) * p.bias_head_step;
    }
    if (first_visible) s.begin = std::max<int64_t>(0, first_visible[place] - begin);
    if (p.tail_visible) {
      s.tail = static_cast<const uint8_t*>(p.tail_visible) + (lane.row * p.length + place) * p.tail;
      s.tail_begin = lane.tokens - p.tail - begin;
    }
    float* to = part(i / item.count, i % item.count);
    to[1] = job.kernels.softmax(s, item.scores + i * item.pitch, to);
  }
  each_run(job.runs + lane.values_at, lane.values, begin, end, [&](const KvRun& run, int64_t from, int64_t to, int64_t at) {
    job.kernels.values(item, run, from, to, at);
  });
  job.kernels.finish(item);
  for (int64_t i = 0; i < all; ++i) {
    std::memcpy(part(i / item.count, i % item.count) + 2, item.sums + i * dim, size_t(dim) * 4);
  }
}

void store(int32_t dtype, void* out, int64_t at, const float* from, int64_t n) {
  if (dtype == kFloat32) {
    std::memcpy(static_cast<float*>(out) + at, from, size_t(n) * 4);
    return;
  }
  uint16_t* to = static_cast<uint16_t*>(out) + at;
  if (dtype == kBfloat16) return floats_to_bfloats(from, to, n);
  for (int64_t i = 0; i < n; ++i) to[i] = float_to_half(from[i]);
}

// The parts of one query, in the order of their tokens.
void merge(const Job& job, const tt_kv_lane& lane, const Cut& cut, int64_t h, int64_t i, float* sums) {
  const tt_kv_problem& p = job.problem;
  const float* parts = job.parts + (cut.first_part + (h * job.queries() + i) * cut.chunks) * job.part_size();
  float maximum = kHidden, total = 0;
  for (int64_t c = 0; c < cut.chunks; ++c) maximum = std::max(maximum, parts[c * job.part_size()]);
  std::fill(sums, sums + p.head_dim, 0.0f);
  for (int64_t c = 0; c < cut.chunks; ++c) {
    const float* part = parts + c * job.part_size();
    if (part[0] == kHidden) continue;
    const float weight = std::exp(part[0] - maximum);
    total += weight * part[1];
    for (int64_t j = 0; j < p.head_dim; ++j) sums[j] += weight * part[2 + j];
  }
  if (maximum == kHidden) return;  // out and lse say so already
  for (int64_t j = 0; j < p.head_dim; ++j) sums[j] /= total;
  const int64_t at = (lane.row * p.query_heads + job.query_head(lane, h, i)) * p.length + job.place(i);
  store(p.dtype, p.out, at * p.head_dim, sums, p.head_dim);
  static_cast<float*>(p.lse)[at] = maximum + std::log(total);
}

struct Memory {
  std::vector<Cut> cuts;
  std::vector<float> parts;
  KvScratch scratch;
};
thread_local Memory memory;

int32_t attend(const tt_kv_problem& p, const tt_kv_lane* lanes, const int64_t* heads, const KvRun* runs, int threads) {
  const int64_t outputs = p.rows * p.query_heads * p.length;
  std::memset(p.out, 0, size_t(outputs * p.head_dim) * (p.dtype == kFloat32 ? 4 : 2));
  std::fill(static_cast<float*>(p.lse), static_cast<float*>(p.lse) + outputs, kHidden);
  const int64_t queries = p.group * p.length;
  int64_t items = 0, parts = 0, products = 0;
  memory.cuts.clear();
  for (int64_t i = 0; i < p.lanes; ++i) {
    const tt_kv_lane& lane = lanes[i];
    if (const int32_t status = check(p, lane, runs)) return status;
    Cut found = cut(p, lane, runs);
    found.first_item = items;
    found.first_part = parts;
    memory.cuts.push_back(found);
    items += lane.heads / found.heads_together * found.query_blocks * found.chunks;
    parts += lane.heads * queries * found.chunks;
    products += lane.heads * lane.tokens * queries * p.head_dim;
  }
  memory.parts.resize(size_t(parts * (p.head_dim + 2)));
  const Job job{p, lanes, heads, runs, *kernels_of(p.isa, p.dtype), memory.cuts.data(), memory.parts.data()};
  std::atomic<int64_t> next{0};
  std::atomic<bool> out_of_memory{false};
  parallel(products < kSerialProducts ? 1 : threads, [&](int id, int count, auto barrier) {
    try {
      int64_t lane = 0;
      for (int64_t i = next++; i < items; i = next++) {
        while (lane + 1 < p.lanes && job.cuts[lane + 1].first_item <= i) ++lane;
        run_item(job, lanes[lane], job.cuts[lane], i - job.cuts[lane].first_item, memory.scratch);
      }
    } catch (const std::bad_alloc&) {
      out_of_memory = true;
    }
    barrier();
    if (out_of_memory) return;
    int64_t first = 0;
    float* sums = nullptr;
    for (int64_t l = 0; l < p.lanes; first += lanes[l++].heads * queries) {
      for (int64_t i = 0; i < lanes[l].heads * queries; ++i) {
        if ((first + i) % count != id) continue;
        if (!sums) sums = memory.scratch.small.take(p.head_dim);
        merge(job, lanes[l], job.cuts[l], i / queries, i % queries, sums);
      }
    }
  });
  return out_of_memory ? TT_NO_MEMORY : TT_OK;
}

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_kv_attention(const tt_kv_problem* problem, const tt_kv_lane* lanes, const int64_t* heads,
                                   const tt_kv_run* runs, int32_t threads) {
  try {
    return trimtab::attend(*problem, lanes, heads, runs, threads);
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
