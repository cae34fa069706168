// x @ W^T for group-affine weights: what all instruction sets share. The packed layout is that of packing.py.
//
// Each instruction set supplies a policy (how to load words, turn codes into values, accumulate); the loops below are
// compiled once per policy. The order of additions in one output does not depend on the batch, on the tile or on the
// number of threads, so neither does the result.
#pragma once

#include <cstdint>
#include <cstring>
#include <vector>

namespace trimtab {

constexpr int kLanes = 32;

enum Dtype : int { kFloat32 = 0, kBFloat16 = 1, kFloat16 = 2 };

struct GridMatmul {
  const void* x;
  int64_t x_dtype, batch, in, out;
  const uint8_t* packed;
  int64_t row_bytes;
  const void* scales;
  int64_t scale_dtype;
  const uint8_t* zeros;  // null: symmetric, zero 2^(bits-1)
  int64_t bits, group, groups;
  void* y;
  int64_t threads;
};

struct Dequantize {
  const uint8_t* packed;
  int64_t row_bytes, in, out;
  const void* scales;
  int64_t scale_dtype;
  const uint8_t* zeros;
  int64_t bits, group, groups;
  void* w;
  int64_t w_dtype, threads;
};

struct Isa {
  int (*matmul)(const GridMatmul&);
  int (*dequantize)(const Dequantize&);
  double (*read)(const void* data, int64_t bytes, int64_t threads);
};

inline float bits_to_float(uint32_t u) {
  float f;
  std::memcpy(&f, &u, 4);
  return f;
}
inline uint32_t float_to_bits(float f) {
  uint32_t u;
  std::memcpy(&u, &f, 4);
  return u;
}
inline float from_bf16(uint16_t h) { return bits_to_float(uint32_t(h) << 16); }
inline uint16_t to_bf16(float f) {  // round to nearest even; NaN stays NaN
  uint32_t u = float_to_bits(f);
  if ((u & 0x7fffffffu) > 0x7f800000u) return uint16_t((u >> 16) | 64);
  return uint16_t((u + 0x7fffu + ((u >> 16) & 1)) >> 16);
}
inline float from_f16(uint16_t h) {
  uint32_t sign = uint32_t(h & 0x8000) << 16, body = h & 0x7fff;
  if (body >= 0x7c00) return bits_to_float(sign | 0x7f800000u | (uint32_t(body & 0x3ff) << 13));
  if (body < 0x400) {  // subnormal: exact as a product
    float f = float(body) * 0x1p-24f;
    return sign ? -f : f;
  }
  return bits_to_float(sign | ((body << 13) + (112u << 23)));
}
inline uint16_t to_f16(float f) {
  uint32_t u = float_to_bits(f), sign = (u >> 16) & 0x8000;
  u &= 0x7fffffffu;
  if (u > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (u >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (u < 0x38800000u) {  // subnormal result: let the adder round
    float a = bits_to_float(u) + 0.5f;
    return uint16_t(sign | (float_to_bits(a) - 0x3f000000u));
  }
  u += 0xfffu + ((u >> 13) & 1);
  return uint16_t(sign | ((u - (112u << 23)) >> 13));
}
inline float load_any(const void* p, int64_t i, int64_t dtype) {
  if (dtype == kFloat32) return static_cast<const float*>(p)[i];
  uint16_t h = static_cast<const uint16_t*>(p)[i];
  return dtype == kBFloat16 ? from_bf16(h) : from_f16(h);
}
inline void store_any(void* p, int64_t i, int64_t dtype, float v) {
  if (dtype == kFloat32) static_cast<float*>(p)[i] = v;
  else static_cast<uint16_t*>(p)[i] = dtype == kBFloat16 ? to_bf16(v) : to_f16(v);
}

template <int B> struct Layout;
template <> struct Layout<2> { static constexpr int words = 1, codes = 8, field = 2; };
template <> struct Layout<3> { static constexpr int words = 3, codes = 16, field = 3; };
template <> struct Layout<4> { static constexpr int words = 1, codes = 4, field = 4; };
template <> struct Layout<8> { static constexpr int words = 1, codes = 2, field = 8; };

// Columns [start, start + lanes) of a word group that lie in one group: what the general path walks over.
struct Segment {
  int32_t words;  // byte offset of word 0 of the block in the row
  int32_t lanes;  // lanes of the block
  int32_t code;   // which code of the lane
  int32_t first, last;  // lanes [first, last) of the run
  int32_t column;       // column of lane 0
  int32_t group;
};

template <int B>
std::vector<Segment> segments(int64_t in, int64_t group, int64_t from_block) {
  using L = Layout<B>;
  std::vector<Segment> found;
  const int64_t block = L::codes * kLanes;
  int64_t offset = from_block * 2 * L::words * kLanes;
  for (int64_t base = from_block * block; base < in;) {
    const int64_t rest = in - base;
    const int lanes = rest >= block ? kLanes : int((rest + L::codes - 1) / L::codes);
    for (int k = 0; k < L::codes; ++k) {
      const int64_t column = base + int64_t(k) * lanes;
      for (int first = 0; first < lanes && column + first < in;) {
        const int64_t g = (column + first) / group;
        int64_t last = (g + 1) * group - column;
        if (last > lanes) last = lanes;
        if (last > in - column) last = in - column;
        found.push_back({int32_t(offset), lanes, k, first, int32_t(last), int32_t(column), int32_t(g)});
        first = int(last);
      }
    }
    offset += 2 * L::words * lanes;
    base += int64_t(lanes) * L::codes;
  }
  return found;
}

}  // namespace trimtab
