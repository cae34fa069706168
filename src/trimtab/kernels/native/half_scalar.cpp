// half_linear on any processor: plain loops over 16 lanes, which compilers turn into what the target has.
#include "half_tile.h"

namespace trimtab {
namespace {

template <bool kBfloat>
struct Scalar {
  static constexpr int kLanes = 16, kRegisters = 1;
  struct sums {
    float v[kLanes];
  };
  using values = sums;

  static sums zero() { return {}; }
  static values load(const uint16_t* p, int count = kLanes) {
    values out{};
    for (int i = 0; i < count; ++i) out.v[i] = kBfloat ? bfloat16_to_float(p[i]) : half_to_float(p[i]);
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

const HalfKernels* half_scalar(bool bfloat16) {
  static constexpr HalfKernels bfloats = half_kernels<Scalar<true>>(), halves = half_kernels<Scalar<false>>();
  return bfloat16 ? &bfloats : &halves;
}

}  // namespace trimtab
