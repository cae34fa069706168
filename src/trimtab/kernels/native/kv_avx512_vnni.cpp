// kv_attention where AVX-512 has VNNI and VBMI, for queries of 16 bits: products of 2- and 4-bit codes are taken with
// whole numbers, four at a time, the rest as in kv_avx512.cpp.
//
// Queries (with the scales of their channels) and softmax weights (with those of their tokens) are rounded to 16 bits
// of the largest of their group, which is finer than the 8 or 11 bits that they came with, and multiplied as two bytes.
#include "kv_kernels.h"

#if defined(__AVX512VNNI__) && defined(__AVX512VBMI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && \
    defined(__AVX512VL__)
#include "kv_vector_avx512.h"

namespace trimtab {
namespace {

template <int N, class T>
struct Table {
  T entries[N];
};

// Rows of BITS-bit codes, 2 or 4. A register holds those of kChannels channels. Field s of a byte, bits [BITS s, ...),
// of byte k of word w is the code of token 8 k + BITS s + w.
template <int BITS>
struct CodeBytes {
  static constexpr int kFields = 8 / BITS, kRow = 4 * BITS, kChannels = 64 / kRow;
  static constexpr int kGroups = kChannels / 4;  // of channels that are summed in one word
  static constexpr float kLargest = 127.0f * 256.0f;
  static constexpr float kSmallest = 1e-30f;  // whose inverse is finite; smaller numbers count as zero
  using words = __m512i;

  // Byte 4 (kGroups b + g) + i: byte b of the row of channel 4 g + i.
  static constexpr Table<64, uint8_t> by_byte() {
    Table<64, uint8_t> table{};
    for (int i = 0; i < 64; ++i) table.entries[i] = uint8_t(kRow * (4 * (i / 4 % kGroups) + i % 4) + i / 4 / kGroups);
    return table;
  }
  // Place of token t among the sums of two fields, 0 and 1 or 2 and 3, of registers in the order of `by_byte`.
  static constexpr Table<kTile, int32_t> by_token() {
    Table<kTile, int32_t> table{};
    for (int t = 0; t < kTile; ++t) table.entries[t] = t / BITS % kFields % 2 * 16 + kGroups * (4 * (t % BITS) + t / 8);
    return table;
  }
  // Token of byte i of a tile's weights: field by field, each in the order of the bytes of a row.
  static constexpr Table<kTile, uint8_t> weight_order() {
    Table<kTile, uint8_t> table{};
    for (int i = 0; i < kTile; ++i) table.entries[i] = uint8_t(8 * (i % 4) + BITS * (i / kRow) + i % kRow / 4);
    return table;
  }

  template <int FIELD>
  TT_INLINE static words field(words bytes) {
    return _mm512_and_si512(FIELD ? _mm512_srli_epi16(bytes, BITS * FIELD) : bytes, _mm512_set1_epi8((1 << BITS) - 1));
  }
  // A row's worth of bytes, for each of the channels.
  TT_INLINE static words repeat(const int8_t* p, std::integral_constant<int, 16>) {
    return _mm512_broadcast_i32x4(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
  }
  TT_INLINE static words repeat(const int8_t* p, std::integral_constant<int, 8>) {
    int64_t value;
    std::memcpy(&value, p, 8);
    return _mm512_set1_epi64(value);
  }
  TT_INLINE static words repeat(const int8_t* p, std::integral_constant<int, 4>) {
    int32_t value;
    std::memcpy(&value, p, 4);
    return _mm512_set1_epi32(value);
  }
  TT_INLINE static __m512 to_floats(words high, words low) {
    return _mm512_cvtepi32_ps(_mm512_add_epi32(_mm512_slli_epi32(high, 8), low));
  }
  // 256 high + low of numbers that are at most kLargest.
  TT_INLINE static void split(__m512 numbers, __m128i& high, __m128i& low) {
    const words whole = _mm512_cvtps_epi32(numbers);
    high = _mm512_cvtepi32_epi8(_mm512_srai_epi32(_mm512_add_epi32(whole, _mm512_set1_epi32(128)), 8));
    low = _mm512_cvtepi32_epi8(whole);
  }
  // The largest size of x [n]; NaN if a number is not finite.
  TT_INLINE static float largest(const float* x, int64_t n) {
    __m512 most = _mm512_setzero_ps();
    __mmask16 bad = 0;
    for (int64_t i = 0; i < n; i += 16) {
      const __m512 some = _mm512_maskz_loadu_ps(n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff), x + i);
      bad = __mmask16(bad | _mm512_fpclass_ps_mask(some, 0x99));  // NaN or infinity
      most = _mm512_max_ps(most, _mm512_abs_ps(some));
    }
    return bad ? std::numeric_limits<float>::quiet_NaN() : _mm512_reduce_max_ps(most);
  }

  // x [n] -> its high and its low bytes; returns what one unit stands for.
  TT_NOINLINE static float round_queries(const float* x, int64_t n, int8_t* high, int8_t* low) {
    const float most = largest(x, n);
    const __m512 inverse = _mm512_set1_ps(most > kSmallest ? kLargest / most : 0.0f);
    for (int64_t i = 0; i < n; i += 16) {
      const __mmask16 some = n - i < 16 ? __mmask16((1u << (n - i)) - 1) : __mmask16(0xffff);
      __m128i h, l;
      split(_mm512_mul_ps(_mm512_maskz_loadu_ps(some, x + i), inverse), h, l);
      _mm_mask_storeu_epi8(high + i, some, h);
      _mm_mask_storeu_epi8(low + i, some, l);
    }
    return most * (1 / kLargest);
  }

  // Weights of `tiles` tiles -> [tile][high, low][32], in the order of the codes; returns what one unit stands for.
  TT_NOINLINE static float round_weights(const float* x, int64_t tiles, int8_t* to) {
    static constexpr auto kOrder = weight_order();
    const __m256i order = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(kOrder.entries));
    const float most = largest(x, tiles * kTile);
    const __m512 inverse = _mm512_set1_ps(most > kSmallest ? kLargest / most : 0.0f);
    for (int64_t t = 0; t < tiles; ++t, x += kTile, to += 2 * kTile) {
      __m128i high[2], low[2];
      for (int i = 0; i < 2; ++i) split(_mm512_mul_ps(_mm512_loadu_ps(x + 16 * i), inverse), high[i], low[i]);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm256_permutexvar_epi8(order, _mm256_set_m128i(high[1], high[0])));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + kTile), _mm256_permutexvar_epi8(order, _mm256_set_m128i(low[1], low[0])));
    }
    return most * (1 / kLargest);
  }

  // sums[q][32] += unit[q] * (query q . codes) over channels [begin, end); bytes[q][high, low][pitch].
  template <int Q>
  TT_NOINLINE static void score_tile(const uint8_t* tile, int64_t begin, int64_t end, const int8_t* bytes, int64_t pitch,
                                     const float* units, float* sums) {
    static constexpr auto kGather = by_byte();
    static constexpr auto kOrder = by_token();
    const words gather = _mm512_loadu_si512(kGather.entries);
    const words order[2] = {_mm512_loadu_si512(kOrder.entries), _mm512_loadu_si512(kOrder.entries + 16)};
    words total[kFields][Q][2];
    unroll<kFields>([&](auto s) TT_INLINE {
      unroll<Q>([&](auto q) TT_INLINE { total[s][q][0] = total[s][q][1] = _mm512_setzero_si512(); });
    });
    for (int64_t c = begin; c < end; c += kChannels) {
      const uint8_t* at = tile + c * kRow;
      KvAvx512::prefetch(at + kScoreAhead * kTile * 2 * kRow);
      const words rows = _mm512_permutexvar_epi8(gather, _mm512_loadu_si512(at));
      unroll<kFields>([&](auto s) TT_INLINE {
        const words codes = field<s>(rows);
        unroll<Q>([&](auto q) TT_INLINE {
          unroll<2>([&](auto part) TT_INLINE {
            const words factor = repeat(bytes + (2 * q + part) * pitch + c, std::integral_constant<int, kChannels>{});
            total[s][q][part] = _mm512_dpbusd_epi32(total[s][q][part], codes, factor);
          });
        });
      });
    }
    unroll<Q>([&](auto q) TT_INLINE {
      __m512 fields[kFields];
      unroll<kFields>([&](auto s) TT_INLINE {
        fields[s] = to_floats(total[s][q][0], total[s][q][1]);
        if constexpr (kGroups == 2) fields[s] = _mm512_add_ps(fields[s], _mm512_permute_ps(fields[s], 0xB1));
      });
      unroll<2>([&](auto half) TT_INLINE {
        __m512 found = _mm512_permutex2var_ps(fields[0], order[half], fields[1]);
        if constexpr (kFields == 4) {  // fields 2 and 3 are those of tokens 4 ... 7 of each 8
          found = _mm512_mask_blend_ps(0xF0F0, found, _mm512_permutex2var_ps(fields[2], order[half], fields[3]));
        }
        float* at = sums + q * kTile + 16 * half;
        _mm512_storeu_ps(at, _mm512_fmadd_ps(found, _mm512_set1_ps(units[q]), _mm512_loadu_ps(at)));
      });
    });
  }

  // lanes[channels / kChannels][q][16] += unit[q] * (codes . weights) for channels [begin, end); a channel has 16 /
  // kChannels lanes. weights[q][kValueTiles][high, low][32].
  template <int Q>
  TT_NOINLINE static void sum_tiles(const uint8_t* tiles, int64_t tile_bytes, int64_t count, int64_t begin, int64_t end,
                                    const int8_t* weights, const float* units, float* lanes) {
    auto channels = [&](auto width, int64_t c) TT_INLINE {
      constexpr int kRegisters = width;
      words total[kRegisters][Q][2];
      unroll<kRegisters>([&](auto r) TT_INLINE {
        unroll<Q>([&](auto q) TT_INLINE { total[r][q][0] = total[r][q][1] = _mm512_setzero_si512(); });
      });
      for (int64_t t = 0; t < count; ++t) {
        words rows[kRegisters];
        unroll<kRegisters>([&](auto r) TT_INLINE {
          const uint8_t* at = tiles + t * tile_bytes + (c + r * kChannels) * kRow;
          KvAvx512::prefetch(at + kValueTiles * tile_bytes);
          rows[r] = _mm512_loadu_si512(at);
        });
        unroll<kFields>([&](auto s) TT_INLINE {
          words codes[kRegisters];
          unroll<kRegisters>([&](auto r) TT_INLINE { codes[r] = field<s>(rows[r]); });
          unroll<Q>([&](auto q) TT_INLINE {
            unroll<2>([&](auto part) TT_INLINE {
              const int8_t* at = weights + ((q * kValueTiles + t) * 2 + part) * kTile + s * kRow;
              const words factor = repeat(at, std::integral_constant<int, kRow>{});
              unroll<kRegisters>([&](auto r) TT_INLINE {
                total[r][q][part] = _mm512_dpbusd_epi32(total[r][q][part], codes[r], factor);
              });
            });
          });
        });
      }
      unroll<kRegisters>([&](auto r) TT_INLINE {
        unroll<Q>([&](auto q) TT_INLINE {
          float* to = lanes + ((c / kChannels + r) * Q + q) * 16;
          _mm512_storeu_ps(to, _mm512_fmadd_ps(to_floats(total[r][q][0], total[r][q][1]), _mm512_set1_ps(units[q]),
                                               _mm512_loadu_ps(to)));
        });
      });
    };
    constexpr int kRegisters = Q == 1 ? 4 : Q == 2 ? 2 : 1;
    int64_t c = begin;
    for (; c + kRegisters * kChannels <= end; c += kRegisters * kChannels) {
      channels(std::integral_constant<int, kRegisters>{}, c);
    }
    for (; c < end; c += kChannels) channels(std::integral_constant<int, 1>{}, c);
  }

  template <int Q>
  static void add_lanes(const float* lanes, int64_t dim, float* sums) {
    for (int64_t c = 0; c < dim; c += kChannels) {
      for (int q = 0; q < Q; ++q, lanes += 16) {
        for (int i = 0; i < kChannels; ++i) {
          float sum = 0;
          for (int j = 0; j < 16 / kChannels; ++j) sum += lanes[i * (16 / kChannels) + j];
          sums[q * dim + c + i] += sum;
        }
      }
    }
  }
};

struct KvVnni : KvAvx512 {
  static constexpr bool kWholeNumbers = true;
  template <int BITS>
  using Bytes = CodeBytes<BITS>;
};

}  // namespace

const KvKernels* kv_avx512_vnni_kernels() {
  static constexpr KvKernels kernels = kv_kernels<KvVnni>();
  return avx512_kernels() && __builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi") ? &kernels
                                                                                                         : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const KvKernels* kv_avx512_vnni_kernels() { return nullptr; }
}  // namespace trimtab
#endif
