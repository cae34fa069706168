// Unrolling at compile time and number formats, without intrinsics.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>

// For functions and lambdas that hold vector registers of their callers: a call would spill them all.
#define TT_INLINE __attribute__((always_inline))
// For what is called once for many instructions, and would be compiled once for each caller.
#define TT_NOINLINE __attribute__((noinline))

namespace trimtab {
namespace {

template <class F, int... I>
constexpr TT_INLINE void unroll_indices(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}

// f(0), f(1), ... f(N - 1), each index a compile-time constant.
template <int N, class F>
constexpr TT_INLINE void unroll(F&& f) {
  unroll_indices(f, std::make_integer_sequence<int, N>{});
}

inline float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, 4);
  return value;
}

inline uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  return bits;
}

inline float bfloat16_to_float(uint16_t value) { return bits_to_float(uint32_t(value) << 16); }

inline uint16_t float_to_bfloat16(float value) {  // to nearest even
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1)) >> 16, quiet = (bits >> 16) | 0x40;
  return uint16_t((bits & 0x7fffffffu) > 0x7f800000u ? quiet : rounded);  // no branch, so that loops vectorise
}

inline void floats_to_bfloats(const float* in, uint16_t* out, int64_t n) {
  for (int64_t i = 0; i < n; ++i) out[i] = float_to_bfloat16(in[i]);
}

inline float half_to_float(uint16_t half) {
  const uint32_t sign = uint32_t(half & 0x8000) << 16, magnitude = uint32_t(half & 0x7fff) << 13;
  if (magnitude >= 0x0f800000u) return bits_to_float(sign | magnitude | 0x70000000u);  // infinity, NaN
  return bits_to_float(sign | float_to_bits(bits_to_float(magnitude) * 0x1p112f));     // subnormals included
}

inline uint16_t float_to_half(float value) {  // to nearest even
  const uint32_t bits = float_to_bits(value), sign = (bits >> 16) & 0x8000;
  uint32_t magnitude = bits & 0x7fffffffu;
  if (magnitude > 0x7f800000u) return uint16_t(sign | 0x7e00);
  if (magnitude >= 0x477ff000u) return uint16_t(sign | 0x7c00);  // rounds to infinity
  if (magnitude < 0x38800000u) {                                 // subnormal: let one addition round
    const float shifted = bits_to_float(magnitude) + 0.5f;
    return uint16_t(sign | (float_to_bits(shifted) - 0x3f000000u));
  }
  magnitude += 0xfffu + ((magnitude >> 13) & 1);
  return uint16_t(sign | ((magnitude - 0x38000000u) >> 13));
}

}  // namespace
}  // namespace trimtab
