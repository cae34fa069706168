// Single numbers of a dtype that is known at run time: 0 float32, 1 float16, 2 bfloat16.
#pragma once

#include "simple.h"

namespace trimtab {
namespace {

inline float load_number(const void* from, int32_t dtype, int64_t at) {
  if (dtype == 0) return static_cast<const float*>(from)[at];
  const uint16_t value = static_cast<const uint16_t*>(from)[at];
  return dtype == 1 ? half_to_float(value) : bfloat16_to_float(value);
}

inline uint16_t narrow_number(float value, int32_t dtype) {
  return dtype == 1 ? float_to_half(value) : float_to_bfloat16(value);
}

inline void store_number(void* out, int32_t dtype, int64_t at, float value) {
  if (dtype == 0) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<uint16_t*>(out)[at] = narrow_number(value, dtype);
  }
}

inline void add_number(void* out, int32_t dtype, int64_t at, float value) {
  store_number(out, dtype, at, load_number(out, dtype, at) + value);
}

}  // namespace
}  // namespace trimtab
