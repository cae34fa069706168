// What stands between the products of a transformer block, row by row: norms, rotary embedding, activation, sums.
//
// Plain loops over float32, compiled once per instruction set (block_scalar.cpp and its like); numbers are rounded to the
// dtype of the model wherever transformers' modules round them. A row's result depends on nothing but the row.
#pragma once

#include <cstdint>

#include "api.h"
#include "simple.h"

#ifdef __F16C__
#include <immintrin.h>
#endif

namespace trimtab {

// Rows hold numbers of one dtype.
struct BlockRows {
  // out[i] = weight[i] * (x[i] / sqrt(mean(x^2) + epsilon)); out may be x.
  void (*norm)(const void* x, const void* weight, float epsilon, void* out, int64_t n);
  // One head in place: x cos + rotate_half(x) sin, of n numbers, an even count.
  void (*rotate)(void* head, const void* cos, const void* sin, int64_t n);
  // out[i] = silu(gate[i]) * up[i].
  void (*gate)(const void* gate, const void* up, void* out, int64_t n);
  // out[i] = a[i] + b[i]; out may be either.
  void (*add)(const void* a, const void* b, void* out, int64_t n);
};

// Null where the compiler could not. The caller has checked that the machine can. dtype: 0 float32, 1 float16, 2 bfloat16.
const BlockRows* block_rows_scalar(int32_t dtype);
const BlockRows* block_rows_avx2(int32_t dtype);
const BlockRows* block_rows_avx512(int32_t dtype);

namespace {

constexpr int64_t kBlock = 64;  // numbers that are float32 at a time

struct Float32 {
  using number = float;
  static void load(const float* from, float* to, int64_t n) { std::memcpy(to, from, size_t(n) * 4); }
  static void store(const float* from, float* to, int64_t n) { std::memcpy(to, from, size_t(n) * 4); }
};

struct Bfloat16 {
  using number = uint16_t;
  static void load(const uint16_t* from, float* to, int64_t n) {
    for (int64_t i = 0; i < n; ++i) to[i] = bfloat16_to_float(from[i]);
  }
  static void store(const float* from, uint16_t* to, int64_t n) { floats_to_bfloats(from, to, n); }
};

struct Float16 {
  using number = uint16_t;
  static void load(const uint16_t* from, float* to, int64_t n) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) {
      _mm256_storeu_ps(to + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from + i))));
    }
#endif
    for (; i < n; ++i) to[i] = half_to_float(from[i]);
  }
  static void store(const float* from, uint16_t* to, int64_t n) {
    int64_t i = 0;
#ifdef __F16C__
    for (; i + 8 <= n; i += 8) {
      _mm_storeu_si128(reinterpret_cast<__m128i*>(to + i),
                       _mm256_cvtps_ph(_mm256_loadu_ps(from + i), _MM_FROUND_TO_NEAREST_INT));
    }
#endif
    for (; i < n; ++i) to[i] = float_to_half(from[i]);
  }
};

// The numbers as they are once they have been stored.
template <class F>
void round_block(float* values, int64_t n) {
  if constexpr (sizeof(typename F::number) == 2) {
    typename F::number stored[kBlock];
    F::store(values, stored, n);
    F::load(stored, values, n);
  }
}

// f(start, numbers) over n numbers.
template <class Do>
void each_block(int64_t n, Do&& f) {
  for (int64_t i = 0; i < n; i += kBlock) f(i, n - i < kBlock ? n - i : kBlock);
}

// e^x to about 1e-7, 0 below -87.7 and infinity above 88.4. Cody and Waite's reduction, a polynomial of degree 7 (Cephes).
inline float exponential(float x) {
  constexpr float kWhole = 12582912.0f;  // 1.5 * 2^23: adding it rounds to a whole number
  const float above = x < -88.0f ? -88.0f : x, clipped = above > 89.0f ? 89.0f : above;  // NaN stays
  const float n = (clipped * 1.44269504f + kWhole) - kWhole;
  const float r = (clipped - n * 0.693359375f) + n * 2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  const float power = bits_to_float(uint32_t(int32_t(n) + 127) << 23);
  return (p * r * r + r + 1.0f) * power;
}

template <class F>
void norm_row(const void* x, const void* weight, float epsilon, void* out, int64_t n) {
  using number = typename F::number;
  const number* from = static_cast<const number*>(x);
  constexpr int kSums = 16;
  float values[kBlock], sums[kSums] = {};
  each_block(n, [&](int64_t start, int64_t count) {
    F::load(from + start, values, count);
    for (int64_t i = count; i < kBlock; ++i) values[i] = 0;
    for (int64_t i = 0; i < kBlock; i += kSums) {
      for (int j = 0; j < kSums; ++j) sums[j] += values[i + j] * values[i + j];
    }
  });
  for (int half = kSums / 2; half; half /= 2) {
    for (int j = 0; j < half; ++j) sums[j] += sums[j + half];
  }
  const float factor = 1.0f / __builtin_sqrtf(sums[0] / float(n) + epsilon);
  float gains[kBlock];
  each_block(n, [&](int64_t start, int64_t count) {
    F::load(from + start, values, count);
    F::load(static_cast<const number*>(weight) + start, gains, count);
    for (int64_t i = 0; i < count; ++i) values[i] *= factor;
    round_block<F>(values, count);
    for (int64_t i = 0; i < count; ++i) values[i] *= gains[i];
    F::store(values, static_cast<number*>(out) + start, count);
  });
}

template <class F>
void rotate_head(void* head, const void* cos, const void* sin, int64_t n) {
  using number = typename F::number;
  number *first = static_cast<number*>(head), *second = first + n / 2;
  // a cos(i) + other sin(i), each product rounded; `i` counts from the start of the head.
  auto turn = [&](const float* a, const float* other, int64_t i, float* to, int64_t count) {
    float cosines[kBlock], sines[kBlock];
    F::load(static_cast<const number*>(cos) + i, cosines, count);
    F::load(static_cast<const number*>(sin) + i, sines, count);
    for (int64_t j = 0; j < count; ++j) cosines[j] *= a[j];
    for (int64_t j = 0; j < count; ++j) sines[j] *= other[j];
    round_block<F>(cosines, count);
    round_block<F>(sines, count);
    for (int64_t j = 0; j < count; ++j) to[j] = cosines[j] + sines[j];
  };
  each_block(n / 2, [&](int64_t start, int64_t count) {
    float a[kBlock], b[kBlock], minus_b[kBlock], turned[kBlock];
    F::load(first + start, a, count);
    F::load(second + start, b, count);
    for (int64_t j = 0; j < count; ++j) minus_b[j] = -b[j];
    turn(a, minus_b, start, turned, count);
    F::store(turned, first + start, count);
    turn(b, a, n / 2 + start, turned, count);
    F::store(turned, second + start, count);
  });
}

template <class F>
void gate_row(const void* gate, const void* up, void* out, int64_t n) {
  using number = typename F::number;
  float gates[kBlock], ups[kBlock];
  each_block(n, [&](int64_t start, int64_t count) {
    F::load(static_cast<const number*>(gate) + start, gates, count);
    F::load(static_cast<const number*>(up) + start, ups, count);
    for (int64_t i = 0; i < count; ++i) gates[i] = gates[i] / (1.0f + exponential(-gates[i]));
    round_block<F>(gates, count);
    for (int64_t i = 0; i < count; ++i) gates[i] *= ups[i];
    F::store(gates, static_cast<number*>(out) + start, count);
  });
}

template <class F>
void add_rows(const void* a, const void* b, void* out, int64_t n) {
  using number = typename F::number;
  float left[kBlock], right[kBlock];
  each_block(n, [&](int64_t start, int64_t count) {
    F::load(static_cast<const number*>(a) + start, left, count);
    F::load(static_cast<const number*>(b) + start, right, count);
    for (int64_t i = 0; i < count; ++i) left[i] += right[i];
    F::store(left, static_cast<number*>(out) + start, count);
  });
}

template <class F>
constexpr BlockRows block_rows() {
  return {norm_row<F>, rotate_head<F>, gate_row<F>, add_rows<F>};
}

// The functions of this file as the including one compiles them.
inline const BlockRows* own_block_rows(int32_t dtype) {
  static constexpr BlockRows rows[] = {block_rows<Float32>(), block_rows<Float16>(), block_rows<Bfloat16>()};
  return rows + dtype;
}

}  // namespace
}  // namespace trimtab
