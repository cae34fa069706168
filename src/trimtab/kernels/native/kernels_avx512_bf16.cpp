// AVX-512 with bfloat16 inputs: codes become exact bfloat16 numbers, code - 2^(bits-1), by one lookup per 32 weights;
// the dot product instruction multiplies them by the inputs and adds in float32. The group's scale multiplies its sum,
// and zero points act through the sums of the inputs. Levels are rounded to bfloat16. The instruction takes subnormal
// inputs as zero.
#include "grid_matmul.h"
#include "simple.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__)
#include "grid_panel_avx512_bf16.h"
#include "grid_rows_avx512.h"

namespace trimtab {
namespace {

constexpr int kRows[kWidthCount] = {4, 4, 4, 2};

inline __m512 dot(__m512 sum, __m512i a, __m512i b) {
  return _mm512_dpbf16_ps(sum, (__m512bh)a, (__m512bh)b);
}

// bfloat16 of code - 2^(BITS-1) for the low 5 bits of an index, of which the code is the low BITS.
template <int BITS>
__m512i code_table() {
  alignas(64) uint16_t table[32];
  for (int i = 0; i < 32; ++i) table[i] = float_to_bfloat16(float((i & ((1 << BITS) - 1)) - (1 << (BITS - 1))));
  return _mm512_load_si512(table);
}

struct ToBfloatAtOnce {
  static __m256i bits(__m512 v) { return (__m256i)_mm512_cvtneps_pbh(v); }
  static __m512i bits(__m512 even, __m512 odd) {
    const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    const __m512i order = _mm512_or_si512(lane, _mm512_slli_epi32(_mm512_add_epi32(lane, _mm512_set1_epi32(16)), 16));
    return _mm512_permutexvar_epi16(order, (__m512i)_mm512_cvtne2ps_pbh(odd, even));
  }
};

// The levels of a row, rounded, for the low 5 bits of an index.
template <int BITS>
__m512i level_table(const float* levels) {
  constexpr int m = (1 << BITS) - 1;
  const __m512i repeated = _mm512_setr_epi32(0, 1, 2, 3, 4 & m, 5 & m, 6 & m, 7 & m, 8 & m, 9 & m, 10 & m, 11 & m,
                                             12 & m, 13 & m, 14 & m, 15 & m);
  const __m512 table = _mm512_maskz_loadu_ps(__mmask16((1u << (1 << BITS)) - 1), levels);
  return _mm512_broadcast_i64x4((__m256i)_mm512_cvtneps_pbh(_mm512_permutexvar_ps(repeated, table)));
}

// The code in the low 8 bits of each 32-bit word, less 128, as float32; it has at most 8 significant bits.
inline __m512i centred_byte(__m512i word) {
  const __m512i code =
      _mm512_ternarylogic_epi32(word, _mm512_set1_epi32(0xff), _mm512_set1_epi32(0x4B000000), 0xEA);  // (a & b) | c
  return _mm512_castps_si512(_mm512_sub_ps(_mm512_castsi512_ps(code), _mm512_set1_ps(8388608.0f + 128.0f)));
}

template <int BITS, int SHIFT>
__m512i decode(__m512i v, __m512i table) {
  if constexpr (BITS == 8) {
    const __m512i even = centred_byte(SHIFT ? _mm512_srli_epi32(v, SHIFT) : v);
    const __m512i odd = centred_byte(_mm512_srli_epi32(v, 16 + SHIFT));
    return _mm512_or_si512(_mm512_srli_epi32(even, 16), odd);
  }
  return _mm512_permutexvar_epi16(SHIFT ? _mm512_srli_epi16(v, SHIFT) : v, table);
}

template <int BITS, int R, int B>
void bf16_tile(const Tile& tile) {
  constexpr int kPlanes = words_per_lane(BITS);
  constexpr int kCodes = codes_per_lane(BITS);
  constexpr int64_t kBlockBytes = 2 * kLanes * kPlanes;
  const Plan& plan = *tile.plan;
  __m512i tables[R];
  unroll<R>([&](auto r) TT_INLINE {
    if constexpr (BITS == 8) {
      tables[r] = _mm512_setzero_si512();
    } else {
      tables[r] = tile.levels ? level_table<BITS>(tile.levels + r * tile.level_step) : code_table<BITS>();
    }
  });
  __m512 totals[R][B], sums[R][B];
  unroll<R>([&](auto r) TT_INLINE { unroll<B>([&](auto b) TT_INLINE { totals[r][b] = sums[r][b] = _mm512_setzero_ps(); }); });
  const float* scale = tile.scales;
  auto leave_group = [&]() TT_INLINE {
    unroll<R>([&](auto r) TT_INLINE {
      const __m512 s = _mm512_set1_ps(scale[r * plan.groups]);
      unroll<B>([&](auto b) TT_INLINE {
        totals[r][b] = _mm512_fmadd_ps(sums[r][b], s, totals[r][b]);
        sums[r][b] = _mm512_setzero_ps();
      });
    });
    ++scale;
  };

  const uint16_t* x = static_cast<const uint16_t*>(tile.x_blocks);
  const uint8_t* block = tile.packed;
  int64_t left = plan.chunks_per_group;
  for (int64_t i = 0; i < plan.blocks; ++i, block += kBlockBytes) {
    unroll<kCodes>([&](auto k) TT_INLINE {
      constexpr bool kTop = BITS == 3 && k == 15;
      constexpr int kPlane = BITS == 3 ? k / 5 : 0;
      constexpr int kShift = kTop ? 0 : BITS * (BITS == 3 ? k % 5 : int(k));
      __m512i w[R];
      unroll<R>([&](auto r) TT_INLINE {
        const uint8_t* at = block + r * tile.row_step;
        if constexpr (kTop) {
          w[r] = Avx512::top_codes(Avx512::load(at), Avx512::load(at + 2 * kLanes), Avx512::load(at + 4 * kLanes));
        } else {
          w[r] = Avx512::load(at + kPlane * 2 * kLanes);
          if constexpr (kShift == 0 && B <= 2) Avx512::prefetch(at + kPlane * 2 * kLanes + Avx512::kPrefetch / R);
        }
        w[r] = decode<BITS, kShift>(w[r], tables[r]);
      });
      unroll<B>([&](auto b) TT_INLINE {
        const __m512i value = _mm512_loadu_si512(x + b * kChunk);
        unroll<R>([&](auto r) TT_INLINE { sums[r][b] = dot(sums[r][b], w[r], value); });
      });
      x += B * kChunk;
      if (--left == 0) {
        leave_group();
        left = plan.chunks_per_group;
      }
    });
  }

  const uint16_t* rest = static_cast<const uint16_t*>(tile.x_rest);
  for (int64_t i = 0; i < plan.segment_count; ++i) {
    const Segment& s = plan.segments[i];
    const __mmask32 lanes = __mmask32(s.count == 32 ? ~0u : (1u << s.count) - 1);
    __m512i w[R];
    unroll<R>([&](auto r) TT_INLINE {
      const uint8_t* at = tile.packed + r * tile.row_step + s.byte_offset;
      __m512i words = _mm512_maskz_loadu_epi16(lanes, at);
      if (BITS == 3 && s.shift < 0) {
        words = Avx512::top_codes(words, _mm512_maskz_loadu_epi16(lanes, at + s.plane_bytes),
                                  _mm512_maskz_loadu_epi16(lanes, at + 2 * s.plane_bytes));
      } else {
        words = _mm512_srl_epi16(words, _mm_cvtsi32_si128(s.shift));
      }
      w[r] = decode<BITS, 0>(words, tables[r]);
    });
    unroll<B>([&](auto b) TT_INLINE {
      const __m512i value = _mm512_maskz_loadu_epi16(lanes, rest + b * tile.rest + s.x_offset);
      unroll<R>([&](auto r) TT_INLINE { sums[r][b] = dot(sums[r][b], w[r], value); });
    });
    if (s.ends_group) leave_group();
  }
  if (left != plan.chunks_per_group && plan.segment_count == 0) leave_group();

  unroll<R>([&](auto r) TT_INLINE {
    unroll<B>([&](auto b) TT_INLINE {
      float out = _mm512_reduce_add_ps(totals[r][b]);
      if (tile.zeros) {
        __m512 shifted = _mm512_setzero_ps();
        for (int64_t g = 0; g < plan.groups; g += 16) {
          const __mmask16 m = plan.groups - g < 16 ? __mmask16((1u << (plan.groups - g)) - 1) : __mmask16(0xffff);
          const int64_t at = r * plan.groups + g;
          const __m512 zero = _mm512_sub_ps(_mm512_maskz_loadu_ps(m, tile.zeros + at),
                                            _mm512_set1_ps(float(1 << (BITS - 1))));
          const __m512 shift = _mm512_mul_ps(zero, _mm512_maskz_loadu_ps(m, tile.scales + at));
          shifted = _mm512_fmadd_ps(shift, _mm512_maskz_loadu_ps(m, tile.x_sums + b * plan.groups + g), shifted);
        }
        out -= _mm512_reduce_add_ps(shifted);
      }
      tile.out[r * B + b] = out;
    });
  });
}

void group_sums(const uint16_t* x, int64_t group, int64_t groups, float* sums) {
  const __m512i ones = _mm512_set1_epi16(0x3f80);
  for (int64_t g = 0; g < groups; ++g, x += group) {
    __m512 sum = _mm512_setzero_ps();
    for (int64_t i = 0; i < group; i += 32) {
      const __mmask32 m = __mmask32(group - i < 32 ? (1u << (group - i)) - 1 : ~0u);
      sum = dot(sum, ones, _mm512_maskz_loadu_epi16(m, x + i));
    }
    sums[g] = _mm512_reduce_add_ps(sum);
  }
}

constexpr Kernels make_kernels() {
  Kernels kernels{};
  kernels.name = "avx512_bf16";
  kernels.bfloat16_inputs = true;
  kernels.wants_sums = true;
  kernels.segment_lanes = 32;
  auto fill = [&](auto bits) {
    unroll<kWidthCount>([&](auto w) {
      kernels.tile_rows[w] = kRows[w];
      kernels.tiles[bits_index(bits)][w] = bf16_tile<bits, kRows[w], kWidths[w]>;
      kernels.single[bits_index(bits)][w] = bf16_tile<bits, 1, kWidths[w]>;
    });
  };
  fill(std::integral_constant<int, 2>{});
  fill(std::integral_constant<int, 3>{});
  fill(std::integral_constant<int, 4>{});
  fill(std::integral_constant<int, 8>{});
  fill_halves<ToHalf>(kernels.halves[0]);
  fill_halves<ToBfloatAtOnce>(kernels.halves[1]);
  unroll<kPanelWidths>([&](auto w) {
    constexpr int width = w + 1, rows = panel_tile_rows(width);
    kernels.panel_rows[w] = rows;
    kernels.panels[w] = panel_tile<rows, width>;
    kernels.panel_single[w] = panel_tile<1, width>;
  });
  kernels.halves_to_floats = Avx512::halves_to_floats;
  kernels.bytes_to_floats = Avx512::bytes_to_floats;
  kernels.floats_to_bfloats = floats_to_bfloats;
  kernels.group_sums = group_sums;
  kernels.read_all = Avx512::read_all;
  return kernels;
}

}  // namespace

const Kernels* avx512_bf16_kernels() {
  static constexpr Kernels kernels = make_kernels();
  return avx512_kernels() && __builtin_cpu_supports("avx512bf16") ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const Kernels* avx512_bf16_kernels() { return nullptr; }
}  // namespace trimtab
#endif
