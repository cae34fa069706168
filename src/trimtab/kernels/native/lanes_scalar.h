// Numbers of a stored dtype as 16 float32 lanes in plain loops, which compilers turn into what the target has.
#pragma once

#include <type_traits>

#include "simple.h"

namespace trimtab {
namespace {

// DTYPE: 0 float32, 1 float16, 2 bfloat16.
template <int DTYPE>
struct ScalarLanes {
  static constexpr int kLanes = 16, kRegisters = 1;
  using stored = std::conditional_t<DTYPE == 0, float, uint16_t>;
  struct sums {
    float v[kLanes];
  };
  using values = sums;

  static sums zero() { return {}; }
  static float widen(stored number) {
    if constexpr (DTYPE == 0) {
      return number;
    } else {
      return DTYPE == 2 ? bfloat16_to_float(number) : half_to_float(number);
    }
  }
  // The first `count` numbers, the others zero and not read.
  static values load(const stored* p, int count = kLanes) {
    values out{};
    for (int i = 0; i < count; ++i) out.v[i] = widen(p[i]);
    return out;
  }
  static values load_floats(const float* p) {
    values out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = p[i];
    return out;
  }
  static void store_floats(float* p, const values& v) {
    for (int i = 0; i < kLanes; ++i) p[i] = v.v[i];
  }
  static values broadcast(float value) {
    values out;
    for (int i = 0; i < kLanes; ++i) out.v[i] = value;
    return out;
  }
  static sums add_products(sums s, const values& a, const values& b) {
    for (int i = 0; i < kLanes; ++i) s.v[i] += a.v[i] * b.v[i];
    return s;
  }
  static float total(sums s) {
    for (int half = kLanes / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) s.v[i] += s.v[i + half];
    }
    return s.v[0];
  }
};

}  // namespace
}  // namespace trimtab
