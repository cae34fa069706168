// sparse_matmul on any processor.
#include "bitmap_tile.h"
#include "lanes_scalar.h"

namespace trimtab {
namespace {

template <int DTYPE>
struct ScalarBitmap : ScalarLanes<DTYPE> {
  using Base = ScalarLanes<DTYPE>;
  using typename Base::stored;
  using typename Base::values;
  using input = float;
  using reader = NumberReader<ScalarBitmap>;
  static constexpr BitmapInputs kInputs = kFloats;
  static constexpr int kStep = Base::kLanes;

  static values expand(const stored* p, uint32_t bits, int = 0) {
    values out{};
    for (; bits; bits &= bits - 1) out.v[__builtin_ctz(bits)] = Base::widen(*p++);
    return out;
  }
  static values load_inputs(const float* p) { return Base::load_floats(p); }
};

struct ScalarCodes : ScalarBitmap<0> {
  using reader = CodeReader<ScalarCodes>;

  static values expand(const int8_t* p, uint32_t bits) {
    values out{};
    for (; bits; bits &= bits - 1) out.v[__builtin_ctz(bits)] = float(*p++);
    return out;
  }
  static sums add_scaled(const sums& total, const sums& own, float scale) {
    return add_products(total, own, broadcast(scale));
  }
};

}  // namespace

const BitmapKernels* bitmap_scalar(int32_t dtype) { return bitmap_table<ScalarBitmap, ScalarCodes>(dtype); }

}  // namespace trimtab
