// int_matmul on any processor: plain loops over the words of a block, which compilers turn into what the target has.
#include "int_tile.h"

namespace trimtab {
namespace {

struct IntScalar {
  static constexpr int kBytes = 64, kPrefetch = 4096;
  struct bytes {
    uint16_t words[kLanes];
  };
  struct sums {
    int32_t words[kLanes];
  };
  static constexpr int tile_rows(int, int) { return 1; }

  static sums zero() { return {}; }
  static bytes load(const uint8_t* p) {
    bytes v;
    for (int i = 0; i < kLanes; ++i) v.words[i] = uint16_t(p[2 * i] | p[2 * i + 1] << 8);
    return v;
  }
  static void prefetch(const uint8_t*) {}
  template <int N>
  static bytes right(bytes v) {
    for (auto& word : v.words) word = uint16_t(N < 0 ? word << (N < 0 ? -N : 0) : word >> (N < 0 ? 0 : N));
    return v;
  }
  static bytes both(bytes v, int mask) {
    for (auto& word : v.words) word = uint16_t(word & mask);
    return v;
  }
  static bytes either(bytes a, const bytes& b) {
    for (int i = 0; i < kLanes; ++i) a.words[i] |= b.words[i];
    return a;
  }
  template <int BITS>
  static sums dot(sums s, const bytes& codes, const bytes& x) {
    for (int i = 0; i < kLanes; ++i) {
      s.words[i] += (codes.words[i] & 0xff) * int8_t(x.words[i] & 0xff) + (codes.words[i] >> 8) * int8_t(x.words[i] >> 8);
    }
    return s;
  }
  static int32_t total(const sums& s) {
    int32_t total = 0;
    for (const int32_t word : s.words) total += word;
    return total;
  }
};

}  // namespace

const IntKernels* int_scalar_kernels() {
  static constexpr IntKernels kernels = int_kernels<IntScalar>();
  return &kernels;
}

}  // namespace trimtab
