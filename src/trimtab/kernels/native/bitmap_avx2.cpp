// sparse_matmul on AVX2, FMA and F16C: a table says for 8 bits which of the next 8 numbers goes where.
#include "bitmap_tile.h"

#if defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#include "lanes_avx2.h"

namespace trimtab {
namespace {

// By 8 bits: for each column the place of its number among those kept, or 0x80 for a column that is not.
struct Places {
  uint8_t of[256][8];
};

constexpr Places make_places() {
  Places places{};
  for (int bits = 0; bits < 256; ++bits) {
    uint8_t next = 0;
    for (int column = 0; column < 8; ++column) places.of[bits][column] = bits >> column & 1 ? next++ : 0x80;
  }
  return places;
}

alignas(64) constexpr Places kPlaces = make_places();

template <int DTYPE>
struct Avx2Bitmap : Avx2Lanes<DTYPE> {
  using Base = Avx2Lanes<DTYPE>;
  using typename Base::stored;
  using typename Base::values;
  using input = float;
  using reader = NumberReader<Avx2Bitmap>;
  static constexpr BitmapInputs kInputs = kFloats;
  static constexpr int kStep = Base::kLanes;

  static values spread(values numbers, uint32_t bits) {
    const __m256i places = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(kPlaces.of[bits])));
    // the sign of a place says that its column is not kept
    return _mm256_blendv_ps(_mm256_permutevar8x32_ps(numbers, places), Base::zero(), _mm256_castsi256_ps(places));
  }
  static values expand(const stored* p, uint32_t bits) { return spread(Base::load(p), bits); }
  static values expand(const stored* p, uint32_t bits, int count) { return spread(Base::load(p, count), bits); }
  static values load_inputs(const float* p) { return Base::load_floats(p); }
};

struct Avx2Codes : Avx2Bitmap<0> {
  using reader = CodeReader<Avx2Codes>;

  static values expand(const int8_t* p, uint32_t bits) {
    const __m256i codes = _mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)));
    return spread(_mm256_cvtepi32_ps(codes), bits);
  }
  static sums add_scaled(sums total, sums own, float scale) { return _mm256_fmadd_ps(own, broadcast(scale), total); }
};

}  // namespace

const BitmapKernels* bitmap_avx2(int32_t dtype) { return bitmap_table<Avx2Bitmap, Avx2Codes>(dtype); }

}  // namespace trimtab
#else
namespace trimtab {
const BitmapKernels* bitmap_avx2(int32_t) { return nullptr; }
}  // namespace trimtab
#endif
