// Attention of a few queries over runs of cached keys and values (run.py), without writing the dense keys or values out.
//
// kv_attention.cpp cuts the work into items, some heads of a lane x a chunk of its tokens, and shares them among threads.
// An item has three steps, for keys and values have different cuts: scores of all key runs, softmax, sums over all value
// runs. A KvKernels table (one per instruction set) computes them. The cuts depend on the problem alone and partial
// results are merged in order, so a result does not depend on the number of threads.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

#include "api.h"

namespace trimtab {

constexpr int kTile = 32;       // tokens of a tile of codes
constexpr int kValueTiles = 8;  // tiles whose weights are multiplied in one pass over the channels

using KvRun = tt_kv_run;

// Floats at a multiple of 64 bytes, kept between calls. What `take` gave before is lost.
class KvBuffer {
 public:
  float* take(int64_t count) {
    if (memory_.size() < size_t(count) + 16) memory_.resize(size_t(count) + 16);
    return memory_.data() + (64 - reinterpret_cast<uintptr_t>(memory_.data()) % 64) % 64 / 4;
  }

 private:
  std::vector<float> memory_;
};

// Memory of one thread, each buffer with one user at a time.
struct KvScratch {
  KvBuffer item;      // what KvItem points to
  KvBuffer queries;   // queries or sums in another order
  KvBuffer head;      // scales, minima and factors of one head
  KvBuffer small;     // of one product
  KvBuffer whole;     // products with whole numbers
  KvBuffer outliers;  // of one tile
  KvBuffer rows, rotated, table;  // a dense tile
  std::vector<uint16_t> halves;  // of one tile
  std::vector<int32_t> places;   // where the channels of a rotation are stored
};

// Some heads of a lane, a chunk of its tokens, all or some of the queries of these heads.
struct KvItem {
  int64_t dim, heads, first_head, count;  // heads from first_head of the runs' heads; queries per head
  int64_t pitch;
  float* queries;  // [heads][count][dim]
  float* scores;   // [heads][count][pitch]: of keys, then softmax weights
  float* sums;     // [heads][count][dim] weighted sums of values
  float* lanes;    // [heads][count * dim * width] sums whose vector lanes are not yet added up
  const float *cos, *sin;
  int64_t half;
  KvScratch* scratch;
};

// What softmax does to the scores of one query.
struct KvSoftmax {
  float scale, softcap;
  const float* bias;      // of the first token of the chunk, or null
  int64_t tokens, begin;  // keys before `begin` are hidden
  const uint8_t* tail;    // visible or not, of the last tokens, or null
  int64_t tail_begin;     // token of the chunk that the first of tail belongs to; can be negative
};

struct KvKernels {
  int width;  // float lanes of a vector
  // Tokens [begin, end) of a run are tokens `at` ... of the chunk.
  void (*keys)(const KvItem&, const KvRun&, int64_t begin, int64_t end, int64_t at);
  void (*values)(const KvItem&, const KvRun&, int64_t begin, int64_t end, int64_t at);
  void (*finish)(const KvItem&);  // lanes are added up into sums
  // Scores become weights exp(score - max); returns the sum of the weights, and the maximum.
  float (*softmax)(const KvSoftmax&, float* scores, float* maximum);
  void (*to_floats)(int32_t dtype, const void* from, int64_t n, float* to);
};

// Null where the compiler or the machine cannot.
const KvKernels* kv_scalar_kernels();
const KvKernels* kv_avx2_kernels();
const KvKernels* kv_avx512_kernels();
const KvKernels* kv_avx512_vnni_kernels();  // for queries of 16 bits

// Rotations that mix heads, and rope, whose table is then read once for all heads, want all heads in one item.
inline bool mixes_heads(const KvRun& run) {
  return run.order || (run.hadamard && (run.hadamard > run.head_dim || run.head_dim % run.hadamard));
}
inline bool wants_all_heads(const KvRun& run) { return mixes_heads(run) || run.first_position >= 0; }

}  // namespace trimtab
