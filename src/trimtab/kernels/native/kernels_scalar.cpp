// Any processor: plain loops over 16 lanes, which compilers turn into what the target has.
#include "grid_fma.h"

namespace trimtab {
namespace {

struct Scalar {
  static constexpr int W = 16;
  static constexpr int kPrefetch = 2048;
  static constexpr int kRows[kWidthCount] = {1, 1, 1, 1};
  struct floats {
    float v[W];
  };
  struct words {
    uint32_t v[W];
  };
  template <int BITS>
  struct Grid {
    float zero, scale;
    const float* levels;
  };

  static floats zero() { return {}; }
  TT_INLINE static void prefetch(const uint8_t* p) { __builtin_prefetch(p); }  // always inline: see vector_avx512.h
  static words load(const uint8_t* p) {
    words out;
    for (int i = 0; i < W; ++i) {  // little-endian on any machine
      out.v[i] = uint32_t(p[4 * i]) | uint32_t(p[4 * i + 1]) << 8 | uint32_t(p[4 * i + 2]) << 16 |
                 uint32_t(p[4 * i + 3]) << 24;
    }
    return out;
  }
  static words load_lanes(const uint8_t* p, int count) {
    words out{};
    for (int i = 0; i < count; ++i) out.v[i] = uint32_t(p[2 * i]) | uint32_t(p[2 * i + 1]) << 8;
    return out;
  }
  static floats load_floats(const float* p) {
    floats out;
    for (int i = 0; i < W; ++i) out.v[i] = p[i];
    return out;
  }
  static floats load_floats(const float* p, int count) {
    floats out{};
    for (int i = 0; i < count; ++i) out.v[i] = p[i];
    return out;
  }
  static floats fma(const floats& a, const floats& b, const floats& c) {
    floats out;
    for (int i = 0; i < W; ++i) out.v[i] = a.v[i] * b.v[i] + c.v[i];
    return out;
  }
  static float sum(floats v) {
    for (int half = W / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) v.v[i] += v.v[i + half];
    }
    return v.v[0];
  }
  static words shift(words v, int count) {
    for (int i = 0; i < W; ++i) v.v[i] >>= count;
    return v;
  }
  static void store_floats(float* p, const floats& v, int count) {
    for (int i = 0; i < count; ++i) p[i] = v.v[i];
  }
  // Bit 15 of three words as a code, in both 16-bit lanes.
  static words top_codes(const words& w0, const words& w1, const words& w2) {
    words out;
    for (int i = 0; i < W; ++i) {
      out.v[i] = (w0.v[i] >> 15 & 0x10001u) | (w1.v[i] >> 14 & 0x20002u) | (w2.v[i] >> 13 & 0x40004u);
    }
    return out;
  }
  template <int BITS>
  static Grid<BITS> grid(float scale, float zero) {
    return {zero, scale, nullptr};
  }
  template <int BITS>
  static Grid<BITS> level_grid(float scale, const float* levels) {
    return {0, scale, levels};
  }
  template <int BITS, int SHIFT>
  static floats decode(const words& v, const Grid<BITS>& g) {
    constexpr uint32_t mask = (1u << BITS) - 1;
    floats out;
    if (g.levels) {
      for (int i = 0; i < W; ++i) out.v[i] = g.levels[v.v[i] >> SHIFT & mask] * g.scale;
    } else {
      for (int i = 0; i < W; ++i) out.v[i] = (float(int32_t(v.v[i] >> SHIFT & mask)) - g.zero) * g.scale;
    }
    return out;
  }
  static void halves_to_floats(const uint16_t* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(in[i]);
  }
  static void bytes_to_floats(const uint8_t* in, float* out, int64_t n) {
    for (int64_t i = 0; i < n; ++i) out[i] = float(in[i]);
  }
  static uint64_t read_all(const uint8_t* p, int64_t bytes) {
    uint64_t sums[8] = {};
    for (int64_t i = 0; i + 64 <= bytes; i += 64) {
      uint64_t values[8];
      std::memcpy(values, p + i, 64);
      for (int j = 0; j < 8; ++j) sums[j] ^= values[j];
    }
    for (int j = 1; j < 8; ++j) sums[0] ^= sums[j];
    return sums[0];
  }
};

}  // namespace

const Kernels* scalar_kernels() {
  static constexpr Kernels kernels = fma_kernels<Scalar>("scalar");
  return &kernels;
}

}  // namespace trimtab
