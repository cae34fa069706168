// What int_matmul needs of AVX-512 (F, BW, DQ, VL), without the products. Include only where these are compiled for.
#pragma once

#include <immintrin.h>

#include "int_tile.h"

namespace trimtab {
namespace {

struct IntAvx512Base {
  static constexpr int kBytes = 64, kPrefetch = 8192;
  using bytes = __m512i;
  using sums = __m512i;
  // Sums, codes and planes stay in 32 registers.
  static constexpr int tile_rows(int bits, int width) { return width == 8 ? (bits == 3 ? 2 : 3) : 4; }

  static sums zero() { return _mm512_setzero_si512(); }
  static bytes load(const uint8_t* p) { return _mm512_loadu_si512(p); }
  TT_INLINE static void prefetch(const uint8_t* p) { _mm_prefetch(reinterpret_cast<const char*>(p), _MM_HINT_T0); }
  template <int N>
  static bytes right(bytes v) {
    return N < 0 ? _mm512_slli_epi16(v, N < 0 ? -N : 0) : N ? _mm512_srli_epi16(v, N < 0 ? 0 : N) : v;
  }
  static bytes both(bytes v, int mask) { return _mm512_and_si512(v, _mm512_set1_epi16(int16_t(mask))); }
  static bytes either(bytes a, bytes b) { return _mm512_or_si512(a, b); }
  static int32_t total(sums s) { return _mm512_reduce_add_epi32(s); }
};

}  // namespace
}  // namespace trimtab
