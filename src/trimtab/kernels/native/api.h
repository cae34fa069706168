// The C interface of libtrimtab_kernels. Python reads it through ctypes (library.py); change both, and TT_ABI.
#pragma once

#include <cstdint>

#define TT_ABI 6
#define TT_EXPORT extern "C" __attribute__((visibility("default")))

enum { TT_OK = 0, TT_NO_ISA = 1, TT_NO_MEMORY = 2, TT_BAD_LANE = 3, TT_BAD_POSITION = 4, TT_BAD_INDEX = 5 };

// Instruction sets, ascending. As an argument: use none above this one. TT_ISA_BEST: the best the machine has.
enum { TT_ISA_BEST = -1, TT_ISA_SCALAR = 0, TT_ISA_AVX2 = 1, TT_ISA_AVX512 = 2, TT_ISA_AVX512_BF16 = 3 };

// A weight [out][in]: scale * (code - zero), or scale * levels[code]. Everything is contiguous. Dtypes here and below:
// 0 float32, 1 float16, 2 bfloat16; of zeros also 3, uint8.
struct tt_grid_weight {
  int64_t out_features, in_features, group_size;  // group_size divides in_features
  const void* packed;                             // [out][row bytes], layout of packing.py
  const void* scales;                             // [out][groups]
  const void* zeros;                              // [out][groups], or null: 2^(bits-1) for all
  const float* levels;                            // [2^bits] or [out][2^bits], or null; up to 4 bits, without zeros
  int64_t level_step;                             // floats from one row's levels to the next: 0 or 2^bits
  int32_t bits;                                   // 2, 3, 4, 8
  int32_t scale_dtype, zero_dtype;
};

// A weight [out][in] of which entries are left out. Row o keeps the columns of its bitmap, words [out][in / 64 rounded up],
// whose bit j of word w is column 64 w + j. What it keeps is consecutive from offsets[o] on: numbers, or for dtype 4 bytes
// of codes from -8 to 7, two to a byte, the lower four bits first, every word's from a new byte on; such a weight is
// scale * code. Bitmap and offsets agree, and no bit is set beyond in: the caller has checked. Everything is contiguous.
struct tt_sparse_weight {
  int64_t out_features, in_features;
  int64_t group_size;      // columns that share a scale, a multiple of 64; the last may be fewer
  const uint64_t* bitmap;
  const void* values;
  const int32_t* offsets;  // [out + 1]
  const uint16_t* scales;  // bfloat16 [out][in / group_size rounded up], or null
  int32_t dtype;           // of the values, as in tt_grid_weight; 4: codes
};

// A weight of which only the columns count whose inputs are large, and left right for the other inputs.
struct tt_gather_weight {
  int64_t out_features, in_features;
  int64_t rank;            // of the low-rank term; 0: there is none
  const void* columns;     // [in][out]
  const float* threshold;  // one: an input counts unless |x| * scale is at most this
  const float* scale;      // [in], or null: 1
  const void *right, *left;  // [rank][in], [out][rank]
  int32_t dtype;           // of the columns, as in tt_grid_weight
  int32_t factor_dtype;    // of the low-rank term: 1, 2
};

// What a product has added to it: a low-rank term, right [rank][in] and left [out][rank], or one in compressed sparse
// rows, offsets [out + 1] into values and columns. What the other kind has is null.
struct tt_block_term {
  const void *right, *left, *values;
  const int32_t *columns, *offsets;
  int64_t rank;
  int32_t dtype;  // of factors (1, 2) or values (0 to 2), as in tt_grid_weight
};

// A linear layer of a block: the product, rounded; plus each term, rounded; plus a bias of the dtype of x, or null. With a
// bitmap it multiplies by `sparse`, with columns by `gather`, and of `weight` only the sizes count.
struct tt_block_linear {
  tt_grid_weight weight;
  tt_sparse_weight sparse;
  tt_gather_weight gather;
  const tt_block_term* terms;
  int64_t term_count;
  const void* bias;
};

// A norm: weight[i] * (x[i] / sqrt(mean(x^2) + epsilon)), the weight of the dtype of x; null: none.
struct tt_block_norm {
  const void* weight;
  float epsilon;
};

// A transformer block of Llama's form. Its parts fit each other; the caller has checked that.
struct tt_block {
  tt_block_linear q, k, v, o, gate, up, down;
  tt_block_norm attention_norm, mlp_norm, q_norm, k_norm;  // the last two of each head, before it is rotated
  int64_t head_dim;
  int32_t dtype;  // of all that is not packed, as in tt_grid_weight
  int32_t isa;
};

struct tt_linear_problem {
  int64_t out_features, in_features;
  int32_t dtype;  // of x, weight, bias and out: 1 float16, 2 bfloat16
  int32_t isa;
};

struct tt_term_problem {
  int64_t out_features, in_features;
  int64_t size;     // rank, or number of entries
  int32_t dtype;    // of factors (1, 2) or values (0 to 2), as in tt_grid_weight
  int32_t x_dtype;  // of x and out
  int32_t isa;
};

struct tt_int_problem {
  int64_t out_features, in_features;  // of the weight
  int64_t width;                      // of x: in_features, unless inputs are gathered
  int32_t bits, x_bits;               // 2, 3, 4, 8; 2 to 8
  int32_t x_dtype, scale_dtype;       // as in tt_grid_weight
  int32_t x_symmetric;
  int32_t index_bytes;                // of one entry of the index: 4, 8
  int32_t isa;
};

struct tt_codebook_problem {
  int64_t out_features, in_features;
  int64_t books, entries;        // codes of a group; vectors of a codebook, a power of two
  int32_t group_size;            // numbers of a vector: 4, 8, 16
  int32_t code_bytes;            // 1: at most 256 entries; 2
  int32_t x_dtype, scale_dtype;  // as in tt_grid_weight
  int32_t isa;
};

TT_EXPORT int32_t tt_abi();
TT_EXPORT int32_t tt_openmp();                  // 1 if built with threads
TT_EXPORT int32_t tt_has_isa(int32_t isa);      // 1 if built for it and the machine has it

// One x [batch][in] times each of `count` weights. out holds one [batch][out] after the other. Contiguous, both of one
// dtype. Returns TT_OK or why not. The caller has checked shapes.
TT_EXPORT int32_t tt_grid_matmul(const tt_grid_weight* weights, int64_t count, const void* x, void* out, int64_t batch,
                                 int32_t dtype, int32_t isa, int32_t threads);

// The dense rows [first, first + rows) of a weight, [rows][in] of `dtype`.
TT_EXPORT int32_t tt_grid_dequantize(const tt_grid_weight* weight, int64_t first, int64_t rows, void* out,
                                     int32_t dtype, int32_t isa, int32_t threads);

// Up to attention: out holds the queries, then the keys, then the values of x [rows][hidden], each [rows][heads][head_dim];
// queries and keys are normed and rotated. Row r reads row r % positions of cos and sin [positions][head_dim].
TT_EXPORT int32_t tt_block_before(const tt_block* block, const void* x, const void* cos, const void* sin,
                                  int64_t positions, void* out, int64_t rows, int32_t threads);

// From attention on: out [rows][hidden] of the attended values [rows][heads * head_dim] and the block's input.
TT_EXPORT int32_t tt_block_after(const tt_block* block, const void* attended, const void* x, void* out, int64_t rows,
                                 int32_t threads);

// x [rows][in], weight [out][in], bias [out] or null, out [rows][out]; all contiguous, 1 to 8 rows. Returns as above.
TT_EXPORT int32_t tt_half_linear(const tt_linear_problem* problem, const void* x, const void* weight, const void* bias,
                                 void* out, int64_t rows, int32_t threads);

// out [rows][out] += (x [rows][in] right^T [in][rank]) left^T [rank][out]; all contiguous, 1 to 8 rows. Returns as above.
TT_EXPORT int32_t tt_low_rank_add(const tt_term_problem* problem, const void* x, const void* right, const void* left,
                                  void* out, int64_t rows, int32_t threads);

// out [rows][out] += x [rows][in] S^T, S in compressed sparse rows: offsets [out + 1] into values and columns.
TT_EXPORT int32_t tt_sparse_add(const tt_term_problem* problem, const void* x, const void* values,
                                const int32_t* columns, const int32_t* offsets, void* out, int64_t rows,
                                int32_t threads);

// x [batch][width], packed [out][row bytes], scales [out], index [in] or null, row_sums [out] or null, out [batch][out];
// all contiguous. x_scale 0: each row's own. Returns as above, TT_BAD_INDEX for an entry that is not below `width`.
TT_EXPORT int32_t tt_int_matmul(const tt_int_problem* problem, const void* x, const void* packed, const void* scales,
                                const void* index, const int32_t* row_sums, void* out, int64_t batch, float x_scale,
                                int32_t threads);

// x [batch][in], codes uint8 or uint16 [out][in / group_size][books], codebooks float16 [books][entries][group_size],
// scales [out], out [batch][out]; all contiguous. Returns as above. A code is taken modulo `entries`; one of a byte
// beyond them names zeros.
TT_EXPORT int32_t tt_codebook_matmul(const tt_codebook_problem* problem, const void* x, const void* codes,
                                     const void* codebooks, const void* scales, void* out, int64_t batch,
                                     int32_t threads);

// The dense weight [rows][in] of the first `rows` output rows, in the problem's x_dtype.
TT_EXPORT int32_t tt_codebook_dequantize(const tt_codebook_problem* problem, const void* codes, const void* codebooks,
                                         const void* scales, void* out, int64_t rows, int32_t threads);

// One x [rows][in] times each of `count` weights. out holds one [rows][out] after the other, of the dtype of x; 1 to 8
// rows. Returns as above.
TT_EXPORT int32_t tt_sparse_matmul(const tt_sparse_weight* weights, int64_t count, const void* x, void* out,
                                   int64_t rows, int32_t dtype, int32_t isa, int32_t threads);

// The dense rows [first, first + rows) of such a weight, [rows][in] of `dtype`.
TT_EXPORT int32_t tt_sparse_dequantize(const tt_sparse_weight* weight, int64_t first, int64_t rows, void* out,
                                       int32_t dtype, int32_t threads);

// One x [rows][in] times each of `count` weights. out holds one [rows][out] after the other, of the dtype of x; 1 to 8
// rows. Returns as above.
TT_EXPORT int32_t tt_gather_matmul(const tt_gather_weight* weights, int64_t count, const void* x, void* out,
                                   int64_t rows, int32_t dtype, int32_t isa, int32_t threads);

// kv_attention. Layouts and meaning of the fields: kv_attention/run.py. Absent tensors are null, absent numbers 0, an
// absent first_position -1. Dtypes as in tt_grid_weight.
struct tt_kv_run {
  int64_t tokens, heads, head_dim, first_position;
  int64_t exact_head_step, exact_token_step;  // elements
  int64_t group_tokens, group_channels, rank, overrides;
  const void *exact, *codes, *high_codes, *codebook, *scale, *minimum, *levels, *token_factors, *channel_factors;
  const void *outlier_starts, *outlier_places, *outlier_values, *order, *override_tokens, *override_values;
  int32_t bits, coupled, hadamard, exact_dtype, outlier_dtype, override_dtype;
};

// Heads are heads[heads_at ...], runs are runs[keys_at ...] and runs[values_at ...].
struct tt_kv_lane {
  int64_t row, tokens, heads_at, heads, keys_at, keys, values_at, values;
};

struct tt_kv_problem {
  int64_t rows, query_heads, length, head_dim;
  int64_t query_row_step, query_head_step, query_step;  // elements
  int64_t group, lanes;                                 // query heads of a KV head; number of lanes
  int64_t rope_positions, rope_half;                    // 0: no table
  int64_t bias_row_step, bias_head_step, tail;          // elements; columns of tail_visible
  const void *query, *cos, *sin, *bias, *first_visible, *tail_visible;
  void *out, *lse;
  float scale, softcap;                                 // softcap 0: none
  int32_t dtype, isa;
};

TT_EXPORT int32_t tt_kv_attention(const tt_kv_problem* problem, const tt_kv_lane* lanes, const int64_t* heads,
                                  const tt_kv_run* runs, int32_t threads);

// Reads `bytes` bytes, a share per thread, and returns the seconds that took.
TT_EXPORT double tt_read_seconds(const void* from, int64_t bytes, int32_t threads);

namespace trimtab {
struct Kernels;
const Kernels* kernels_for(int32_t isa, bool bfloat16_inputs);
}  // namespace trimtab
