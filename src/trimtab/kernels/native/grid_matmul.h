// out[b][o] = sum_i x[b][i] * scale[o][g(i)] * (code[o][i] - zero[o][g(i)]), on the packed layout of packing.py; or with
// level[o][code[o][i]] in place of the difference.
//
// grid_plan.cpp says how a row is walked. grid_matmul.cpp cuts the work into tiles and shares it among threads; a
// Kernels table (one per instruction set) computes tiles. grid_dequantize.cpp writes weights out. grid_panel.cpp writes a
// few rows out into a cache and multiplies them, which pays when the batch is no longer small. Every sum is taken in an
// order that depends on the row and the layout alone, so a result depends neither on the number of threads nor on the
// other rows of the batch, as long as their number chooses the same way.
#pragma once

#include <cstdint>

namespace trimtab {

constexpr int kLanes = 32;                      // 16-bit lanes of a full block
constexpr int kChunk = kLanes;                  // weights under one shift of a full block
constexpr int kWidths[] = {1, 2, 4, 8};         // batch rows of a tile
constexpr int kWidthCount = 4;
constexpr int kMaxTileRows = 8;
constexpr int kPanelWidths = 8;                 // batch rows of a panel tile: 1 to 8

constexpr int codes_per_lane(int bits) { return bits == 2 ? 8 : bits == 3 ? 16 : bits == 4 ? 4 : 2; }
constexpr int words_per_lane(int bits) { return bits == 3 ? 3 : 1; }
constexpr int bits_index(int bits) { return bits == 8 ? 3 : bits - 2; }

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2, kUint8 = 3 };

// A run of weights that one masked load covers: lanes of one block, one shift, one group.
struct Segment {
  int32_t byte_offset;   // of the first lane's word from the start of the row; for a top code, its word in plane 0
  int32_t plane_bytes;   // from one plane to the next
  int32_t shift;         // -1: code 15 of a 3-bit lane, spread over bit 15 of three words
  int32_t count;         // lanes, at most the `segment_lanes` of the kernels
  int32_t x_offset;      // of the first weight's input from the start of the inputs outside the full blocks
  int32_t group;
  int32_t ends_group;
};

// How a row is walked: full blocks first, chunk by chunk, then segments. If groups are not whole chunks there are no
// full blocks and all is segments, which is slower.
struct Plan {
  int64_t blocks;
  int64_t chunks_per_group;
  int64_t groups;
  const Segment* segments;
  int64_t segment_count;
};

// `rows` output rows x `width` batch rows; which, is the kernel's own template argument.
struct Tile {
  const Plan* plan;
  const uint8_t* packed;   // first row
  int64_t row_step;        // bytes from one row of the tile to the next
  const float* scales;     // [rows][groups]
  const float* zeros;      // [rows][groups], or null if symmetric
  const float* levels;     // [rows][2^bits], `level_step` apart, or null
  int64_t level_step;
  const void* x_blocks;    // inputs of the full blocks: [chunk][width][32], in the kernels' order and dtype
  const void* x_rest;      // the others: [width][rest], in natural order
  int64_t rest;            // pitch of x_rest
  const float* x_sums;     // [width][groups] sums of the inputs of each group, or null if not wanted
  float* out;              // [rows][width]
};

using TileKernel = void (*)(const Tile&);

// The float32 weights of one row, in order, from segments that cover all of it. zeros and levels may be null.
using RowDecoder = void (*)(const Plan&, const uint8_t* packed, const float* scales, const float* zeros,
                            const float* levels, float* out);

// The same rounded to a 16-bit format, from full blocks and segments.
using HalfRowDecoder = void (*)(const Plan&, const uint8_t* packed, const float* scales, const float* zeros,
                                const float* levels, uint16_t* out);

// out[b][r] (+)= sum_i w[r][i] * x[b][i] over `steps` x 32 bfloat16 numbers. Rows and width are template arguments.
struct PanelTile {
  const uint16_t* weights;  // first row
  int64_t row_step;         // numbers from one row to the next
  const uint16_t* x;        // [step][width][32]
  int64_t steps;
  float* out;               // [width][out_step]
  int64_t out_step;
  bool add;                 // to what is there
};
using PanelKernel = void (*)(const PanelTile&);

struct Kernels {
  const char* name;
  bool bfloat16_inputs;                     // inputs are kept in bfloat16; else they are converted to float32
  bool wants_sums;                          // zero points are applied through x_sums
  int segment_lanes;
  int tile_rows[kWidthCount];               // rows of the kernels in `tiles`, by width
  TileKernel tiles[4][kWidthCount];         // [bits][width]
  TileKernel single[4][kWidthCount];        // the same for one row
  RowDecoder rows[4];                       // [bits]; null with bfloat16 inputs
  HalfRowDecoder halves[2][4];              // [bfloat16?][bits], or null
  int panel_rows[kPanelWidths];             // rows of the kernels in `panels`, by width - 1
  PanelKernel panels[kPanelWidths];         // null without bfloat16 inputs
  PanelKernel panel_single[kPanelWidths];   // the same for one row
  void (*halves_to_floats)(const uint16_t*, float*, int64_t);
  void (*bytes_to_floats)(const uint8_t*, float*, int64_t);
  void (*floats_to_bfloats)(const float*, uint16_t*, int64_t);  // null with bfloat16 inputs
  void (*group_sums)(const uint16_t* x, int64_t group, int64_t groups, float* sums);
  uint64_t (*read_all)(const uint8_t*, int64_t bytes);
};

// Null where the compiler or the machine cannot.
const Kernels* scalar_kernels();
const Kernels* avx2_kernels();
const Kernels* avx512_kernels();
const Kernels* avx512_bf16_kernels();

}  // namespace trimtab
