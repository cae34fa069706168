// Rows written out in a 16-bit format with AVX-512 (F, BW, DQ, VL). Up to 4 bits one lookup gives 32 rounded weights.
//
// `To` names the format: bits(floats) rounds 16 numbers to nearest even; bits(even, odd) rounds 32 and puts them in order.
#pragma once

#include "grid_group.h"
#include "vector_avx512.h"

namespace trimtab {
namespace {

TT_INLINE inline __m512i in_order(__m256i even, __m256i odd) {
  return _mm512_or_si512(_mm512_cvtepu16_epi32(even), _mm512_slli_epi32(_mm512_cvtepu16_epi32(odd), 16));
}

struct ToHalf {
  static __m256i bits(__m512 v) { return _mm512_cvtps_ph(v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC); }
  static __m512i bits(__m512 even, __m512 odd) { return in_order(bits(even), bits(odd)); }
};

struct ToBfloat {
  static __m256i bits(__m512 v) {
    const __m512i word = _mm512_castps_si512(v);
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(word, 16), _mm512_set1_epi32(1));
    const __m512i shifted = _mm512_add_epi32(_mm512_add_epi32(word, _mm512_set1_epi32(0x7fff)), odd);
    const __mmask16 nan = _mm512_cmp_ps_mask(v, v, _CMP_UNORD_Q);
    return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(_mm512_srli_epi32(shifted, 16), nan, _mm512_set1_epi32(0x7fc0)));
  }
  static __m512i bits(__m512 even, __m512 odd) { return in_order(bits(even), bits(odd)); }
};

// What decodes the codes of one group. Up to 4 bits: the rounded weights of all codes, repeated to 32 entries. 8 bits: a
// weight is slope * (1 + code / 256) - shift, exactly if the scale has 16 bits and the zero point is whole.
template <int BITS>
struct HalfGrid {
  __m512i table;
};
template <>
struct HalfGrid<8> {
  __m512 slope, shift;
};

template <class To, int BITS>
TT_INLINE inline HalfGrid<BITS> half_grid(float scale, const float* zero, const float* levels) {
  if constexpr (BITS == 8) {
    return {_mm512_set1_ps(256 * scale), _mm512_set1_ps((256 + (zero ? *zero : 128)) * scale)};
  } else {
    return {_mm512_broadcast_i64x4(To::bits(grid_of<Avx512, BITS>(scale, zero, levels).values))};
  }
}

// The weights of codes at bits 15 to 22 of each word, where they are the mantissa of a number from 1 to 2.
TT_INLINE inline __m512 byte_weights(__m512i words, const HalfGrid<8>& grid) {
  const __m512i number = _mm512_ternarylogic_epi32(words, _mm512_set1_epi32(0x7f8000), _mm512_set1_epi32(0x3f800000),
                                                   0xEA);  // (a & b) | c
  return _mm512_fmsub_ps(_mm512_castsi512_ps(number), grid.slope, grid.shift);
}

// Weights of the codes in the low bits of each 16-bit lane.
template <class To, int BITS>
TT_INLINE inline __m512i half_weights(__m512i lanes, const HalfGrid<BITS>& grid) {
  if constexpr (BITS == 8) {
    return To::bits(byte_weights(_mm512_slli_epi32(lanes, 15), grid), byte_weights(_mm512_srli_epi32(lanes, 1), grid));
  } else {
    return _mm512_permutexvar_epi16(lanes, grid.table);
  }
}

template <class To, int BITS>
void decode_half_row(const Plan& plan, const uint8_t* packed, const float* scales, const float* zeros,
                     const float* levels, uint16_t* out) {
  constexpr int kCodes = codes_per_lane(BITS);
  constexpr int64_t kBlockBytes = 2 * kLanes * words_per_lane(BITS);
  HalfGrid<BITS> grid;
  int64_t group = -1, left = 0;
  auto enter = [&](int64_t next) TT_INLINE {
    group = next;
    grid = half_grid<To, BITS>(scales[group], zeros ? zeros + group : nullptr, levels);
  };
  const uint8_t* block = packed;
  for (int64_t i = 0; i < plan.blocks; ++i, block += kBlockBytes) {
    unroll<kCodes>([&](auto k) TT_INLINE {
      if (left == 0) {
        enter(group + 1);
        left = plan.chunks_per_group;
      }
      --left;
      constexpr bool kTop = BITS == 3 && k == 15;
      constexpr int kPlane = BITS == 3 ? k / 5 : 0;
      constexpr int kShift = kTop ? 0 : BITS * (BITS == 3 ? k % 5 : int(k));
      __m512i lanes = Avx512::load(block + (kTop ? 0 : kPlane * 2 * kLanes));
      if constexpr (kTop) {
        lanes = Avx512::top_codes(lanes, Avx512::load(block + 2 * kLanes), Avx512::load(block + 4 * kLanes));
      } else if constexpr (kShift != 0) {
        lanes = _mm512_srli_epi16(lanes, kShift);
      }
      _mm512_storeu_si512(out, half_weights<To, BITS>(lanes, grid));
      out += kChunk;
    });
  }
  for (int64_t i = 0; i < plan.segment_count; ++i) {
    const Segment& s = plan.segments[i];
    if (s.group != group) enter(s.group);
    const __mmask32 mask = __mmask32(s.count == 32 ? ~0u : (1u << s.count) - 1);
    const uint8_t* at = packed + s.byte_offset;
    __m512i lanes = _mm512_maskz_loadu_epi16(mask, at);
    if (BITS == 3 && s.shift < 0) {
      lanes = Avx512::top_codes(lanes, _mm512_maskz_loadu_epi16(mask, at + s.plane_bytes),
                                _mm512_maskz_loadu_epi16(mask, at + 2 * s.plane_bytes));
    } else {
      lanes = _mm512_srl_epi16(lanes, _mm_cvtsi32_si128(s.shift));
    }
    _mm512_mask_storeu_epi16(out + s.x_offset, mask, half_weights<To, BITS>(lanes, grid));
  }
}

// Fills the table of row decoders of one format.
template <class To>
constexpr void fill_halves(HalfRowDecoder (&halves)[4]) {
  halves[bits_index(2)] = decode_half_row<To, 2>;
  halves[bits_index(3)] = decode_half_row<To, 3>;
  halves[bits_index(4)] = decode_half_row<To, 4>;
  halves[bits_index(8)] = decode_half_row<To, 8>;
}

}  // namespace
}  // namespace trimtab
