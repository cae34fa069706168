// sparse_matmul on AVX-512 (F, BW, DQ, VL): the bits are the mask of the instruction that spreads the numbers.
#include "bitmap_tile.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "lanes_avx512.h"

namespace trimtab {
namespace {

template <int DTYPE>
struct Avx512Bitmap : Avx512Lanes<DTYPE> {
  using Base = Avx512Lanes<DTYPE>;
  using typename Base::stored;
  using typename Base::values;
  using input = float;
  using reader = NumberReader<Avx512Bitmap>;
  static constexpr BitmapInputs kInputs = kFloats;
  static constexpr int kStep = Base::kLanes;

  static values expand(const stored* p, uint32_t bits) {
    return _mm512_maskz_expand_ps(__mmask16(bits), Base::load(p));
  }
  static values expand(const stored* p, uint32_t bits, int count) {
    return _mm512_maskz_expand_ps(__mmask16(bits), Base::load(p, count));
  }
  static values load_inputs(const float* p) { return Base::load_floats(p); }
};

struct Avx512Codes : Avx512Bitmap<0> {
  using reader = CodeReader<Avx512Codes>;

  static values expand(const int8_t* p, uint32_t bits) {
    const __m512i codes = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
    return _mm512_maskz_expand_ps(__mmask16(bits), _mm512_cvtepi32_ps(codes));
  }
  static sums add_scaled(sums total, sums own, float scale) { return _mm512_fmadd_ps(own, broadcast(scale), total); }
};

}  // namespace

const BitmapKernels* bitmap_avx512(int32_t dtype) { return bitmap_table<Avx512Bitmap, Avx512Codes>(dtype); }

}  // namespace trimtab
#else
namespace trimtab {
const BitmapKernels* bitmap_avx512(int32_t) { return nullptr; }
}  // namespace trimtab
#endif
