// sparse_matmul on AVX-512 BF16 and VBMI2: numbers are spread and multiplied as they are, 32 at once. The dot product
// takes subnormal numbers as zero.
#include "bitmap_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__) && \
    defined(__AVX512BF16__) && defined(__AVX512VBMI2__)
#include <immintrin.h>

namespace trimtab {
namespace {

struct Bf16Lanes {
  static constexpr int kStep = 32, kRegisters = 32;
  using input = uint16_t;
  using sums = __m512;
  using values = __m512i;

  static sums zero() { return _mm512_setzero_ps(); }
  static values load_inputs(const uint16_t* p) { return _mm512_loadu_si512(p); }
  static sums add_products(sums s, values a, values b) { return _mm512_dpbf16_ps(s, (__m512bh)a, (__m512bh)b); }
  static float total(sums s) { return _mm512_reduce_add_ps(s); }
};

struct Bf16Bitmap : Bf16Lanes {
  static constexpr BitmapInputs kInputs = kBfloats;
  using stored = uint16_t;
  using reader = NumberReader<Bf16Bitmap>;

  static values expand(const uint16_t* p, uint32_t bits) {
    return _mm512_maskz_expand_epi16(__mmask32(bits), _mm512_loadu_si512(p));
  }
  static values expand(const uint16_t* p, uint32_t bits, int count) {
    const __mmask32 first = __mmask32((uint64_t(1) << count) - 1);
    return _mm512_maskz_expand_epi16(__mmask32(bits), _mm512_maskz_loadu_epi16(first, p));
  }
};

// The numbers from -8 to 7 in bfloat16, by code, twice: 0 to 7, then -8 to -1.
alignas(64) constexpr uint16_t kNumbers[32] = {
    0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0, 0xc080, 0xc040,
    0xc000, 0xbf80, 0x0000, 0x3f80, 0x4000, 0x4040, 0x4080, 0x40a0, 0x40c0, 0x40e0, 0xc100, 0xc0e0, 0xc0c0, 0xc0a0,
    0xc080, 0xc040, 0xc000, 0xbf80};

// The codes of a word are spread at once, a byte to a column; then looked up as numbers, those of even columns first,
// because the lookup reads the lower bits of every two bytes.
struct Bf16CodeReader {
  static constexpr bool kScaled = true;
  const uint8_t* at;
  __m512i codes;

  explicit Bf16CodeReader(const void* values) : at(static_cast<const uint8_t*>(values)) {}
  Bf16CodeReader() = default;
  template <bool kCareful>
  TT_INLINE void open(uint64_t bits) {
    const int bytes = (__builtin_popcountll(bits) + 1) / 2;
    const __mmask32 own = __mmask32((uint64_t(1) << bytes) - 1);
    const __m256i packed = kCareful ? _mm256_maskz_loadu_epi8(own, at)
                                    : _mm256_loadu_si256(reinterpret_cast<const __m256i*>(at));
    const __m512i wide = _mm512_cvtepu8_epi16(packed);
    const __m512i apart = _mm512_ternarylogic_epi32(wide, _mm512_slli_epi16(wide, 4), _mm512_set1_epi8(15), 0xa8);
    codes = _mm512_maskz_expand_epi8(__mmask64(bits), apart);
    at += bytes;
  }
  template <bool kCareful>
  TT_INLINE __m512i take(int part, uint32_t) {
    return _mm512_permutexvar_epi16(part ? _mm512_srli_epi16(codes, 8) : codes, _mm512_load_si512(kNumbers));
  }
};

struct Bf16Codes : Bf16Lanes {
  static constexpr BitmapInputs kInputs = kSplitBfloats;
  static constexpr int kRegisters = 28;  // readers have theirs
  using reader = Bf16CodeReader;

  static sums add_scaled(sums total, sums own, float scale) {
    return _mm512_fmadd_ps(own, _mm512_set1_ps(scale), total);
  }
};

}  // namespace

const BitmapKernels* bitmap_avx512_bf16(int32_t dtype) {
  static constexpr BitmapKernels numbers = bitmap_kernels<Bf16Bitmap>(), codes = bitmap_kernels<Bf16Codes>();
  if (!__builtin_cpu_supports("avx512vbmi2")) return nullptr;
  return dtype == kCodes ? &codes : dtype == 2 ? &numbers : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const BitmapKernels* bitmap_avx512_bf16(int32_t) { return nullptr; }
}  // namespace trimtab
#endif
