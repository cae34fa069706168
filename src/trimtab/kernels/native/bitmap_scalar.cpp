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
  static constexpr int kStep = Base::kLanes;

  static values expand(const stored* p, uint32_t bits, int = 0) {
    values out{};
    for (; bits; bits &= bits - 1) out.v[__builtin_ctz(bits)] = Base::widen(*p++);
    return out;
  }
  static values load_inputs(const float* p) { return Base::load_floats(p); }
};

}  // namespace

const BitmapKernels* bitmap_scalar(int32_t dtype) { return bitmap_table<ScalarBitmap>(dtype); }

}  // namespace trimtab
