// Rows of x as whole numbers, in plain loops that compilers turn into what the file's target has.
#pragma once

#include <cmath>
#include <limits>

#include "int_matmul.h"
#include "simple.h"

namespace trimtab {
namespace {

// Limits of a scale that a row finds for itself between its smallest and largest input (QLLM's).
constexpr float kSmallestScale = 1e-5f, kLargestScale = 1e4f;

inline void int_to_floats(int32_t dtype, const void* x, int64_t n, float* out) {
  if (dtype == kFloat32) {
    std::memcpy(out, x, size_t(n) * 4);
    return;
  }
  const uint16_t* values = static_cast<const uint16_t*>(x);
  if (dtype == kFloat16) {
    for (int64_t i = 0; i < n; ++i) out[i] = half_to_float(values[i]);
  } else {
    for (int64_t i = 0; i < n; ++i) out[i] = bfloat16_to_float(values[i]);
  }
}

// A float's bits as an integer of the same order; its own inverse. NaN is beyond both infinities.
inline int32_t ordered(int32_t bits) { return bits ^ ((bits >> 31) & 0x7fffffff); }

// Into [low, high]; NaN becomes low.
inline float clamped(float value, float low, float high) {
  value = value > low ? value : low;
  return value < high ? value : high;
}

inline IntScale round_symmetric(const IntRounding& rounding, const float* x, int64_t n, int8_t* q) {
  const float high = float((1 << (rounding.bits - 1)) - 1);
  uint32_t top = 0;  // as integers, magnitudes are in order, NaN last
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t magnitude = float_to_bits(x[i]) & 0x7fffffffu;
    top = magnitude > top ? magnitude : top;
  }
  const float largest = bits_to_float(top);
  const bool own = rounding.scale == 0;
  const float scale = own ? largest / high : rounding.scale;
  if (scale == 0) {
    std::memset(q, 0, size_t(n));
    return {0, 0};
  }
  for (int64_t i = 0; i < n; ++i) q[i] = int8_t(int32_t(clamped(__builtin_rintf(x[i] / scale), -high, high)));
  const bool bad = own ? !(largest <= std::numeric_limits<float>::max()) : largest != largest;
  return {bad ? std::numeric_limits<float>::quiet_NaN() : scale, 0};
}

inline IntScale round_asymmetric(const IntRounding& rounding, const float* x, int64_t n, int8_t* q) {
  const float codes = float((1 << rounding.bits) - 1), middle = float(1 << (rounding.bits - 1));
  int32_t low = std::numeric_limits<int32_t>::max(), high = std::numeric_limits<int32_t>::min();
  for (int64_t i = 0; i < n; ++i) {
    const int32_t place = ordered(int32_t(float_to_bits(x[i])));
    low = place < low ? place : low;
    high = place > high ? place : high;
  }
  const float smallest = bits_to_float(uint32_t(ordered(low))), largest = bits_to_float(uint32_t(ordered(high)));
  constexpr float kMax = std::numeric_limits<float>::max();
  if (!(smallest >= -kMax && largest <= kMax)) {
    std::memset(q, 0, size_t(n));
    return {std::numeric_limits<float>::quiet_NaN(), 0};
  }
  const float scale = clamped((largest - smallest) / codes, kSmallestScale, kLargestScale);
  const float zero = __builtin_rintf(-smallest / scale);
  for (int64_t i = 0; i < n; ++i) {
    q[i] = int8_t(int32_t(clamped(__builtin_rintf(x[i] / scale) + zero, 0, codes) - middle));
  }
  return {scale, zero};
}

inline IntScale int_round(const IntRounding& rounding, const float* x, int64_t n, int8_t* q) {
  return rounding.symmetric ? round_symmetric(rounding, x, n, q) : round_asymmetric(rounding, x, n, q);
}

inline int32_t int_sum(const int8_t* q, int64_t n) {
  int32_t sum = 0;
  for (int64_t i = 0; i < n; ++i) sum += q[i];
  return sum;
}

template <int BITS>
void int_place(const int8_t* q, const IntPlace& place) {
  constexpr int kVectors = int_vectors(BITS);
  int8_t* to = place.x;
  for (int64_t block = 0; block < place.blocks; ++block, q += 2 * kVectors * kLanes) {
    for (int v = 0; v < kVectors; ++v, to += place.width * kPlaneBytes) {
      const int8_t *even = q + v * kLanes, *odd = even + kVectors * kLanes;
      for (int l = 0; l < kLanes; ++l) {
        to[2 * l] = even[l];
        to[2 * l + 1] = odd[l];
      }
    }
  }
  if (!place.tail_lanes) return;
  for (int v = 0; v < kVectors; ++v, to += place.width * kPlaneBytes) {
    std::memset(to, 0, kPlaneBytes);
    for (int64_t l = 0; l < place.tail_lanes; ++l) {
      to[2 * l] = q[v * place.tail_lanes + l];
      to[2 * l + 1] = q[(v + kVectors) * place.tail_lanes + l];
    }
  }
}

}  // namespace
}  // namespace trimtab
