// codebook_matmul on any processor: plain loops over the numbers of a vector, which compilers turn into what the target
// has.
#include "codebook_tile.h"

namespace trimtab {
namespace {

template <int G>
struct Plain {
  struct values {
    float v[G];
  };

  static values zero() { return {}; }
  static values load(const float* p) {
    values out;
    std::memcpy(out.v, p, sizeof(out.v));
    return out;
  }
  static values load(const uint16_t* p) {
    values out;
    for (int i = 0; i < G; ++i) out.v[i] = half_to_float(p[i]);
    return out;
  }
  static values add(values a, const values& b) {
    for (int i = 0; i < G; ++i) a.v[i] += b.v[i];
    return a;
  }
  static values multiply_add(const values& a, const values& b, values sum) {
    for (int i = 0; i < G; ++i) sum.v[i] += a.v[i] * b.v[i];
    return sum;
  }
  static void store(float* p, const values& a) { std::memcpy(p, a.v, sizeof(a.v)); }
  static float total(values a) {
    for (int half = G / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) a.v[i] += a.v[i + half];
    }
    return a.v[0];
  }
};

}  // namespace

const CodebookKernels* codebook_scalar_kernels() {
  static constexpr CodebookKernels kernels = codebook_kernels<Plain, 16>();
  return &kernels;
}

}  // namespace trimtab
