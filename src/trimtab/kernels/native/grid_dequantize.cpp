// Packed weights written out as dense rows.
#include <new>
#include <vector>

#include "api.h"
#include "grid_matmul.h"
#include "grid_plan.h"
#include "simple.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialWeights = 1 << 17;  // below this, starting threads costs more than they save

struct Scratch {
  std::vector<Segment> segments;
  std::vector<float> row, parameters;
};
thread_local Scratch scratch;

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_grid_dequantize(const tt_grid_weight* weight, int64_t first, int64_t rows, void* out,
                                      int32_t dtype, int32_t isa, int32_t threads) {
  using namespace trimtab;
  const Kernels* kernels = kernels_for(isa, dtype == kBfloat16);
  if (!kernels) return TT_NO_ISA;
  try {
    const int bits = bits_index(weight->bits);
    const HalfRowDecoder halves = dtype == kFloat32 ? nullptr : kernels->halves[dtype == kBfloat16][bits];
    const Plan plan = make_plan(*weight, kernels->segment_lanes, halves != nullptr, scratch.segments);
    const int64_t bytes = row_bytes(*weight), n = weight->in_features, groups = plan.groups;
    const uint8_t* packed = static_cast<const uint8_t*>(weight->packed);
    parallel(rows * n < kSerialWeights ? 1 : threads, [&](int id, int count, auto) {
      scratch.parameters.resize(size_t(2 * groups));
      scratch.row.resize(size_t(halves ? 0 : n));
      float* scales = scratch.parameters.data();
      float* zeros = weight->zeros ? scales + groups : nullptr;
      for (int64_t i = rows * id / count; i < rows * (id + 1) / count; ++i) {
        const int64_t row = first + i;
        load_floats(*kernels, weight->scale_dtype, weight->scales, row * groups, groups, scales);
        if (zeros) load_floats(*kernels, weight->zero_dtype, weight->zeros, row * groups, groups, zeros);
        const float* levels = weight->levels ? weight->levels + row * weight->level_step : nullptr;
        uint16_t* half_row = static_cast<uint16_t*>(out) + i * n;
        if (halves) {
          halves(plan, packed + row * bytes, scales, zeros, levels, half_row);
          continue;
        }
        float* float_row = dtype == kFloat32 ? static_cast<float*>(out) + i * n : scratch.row.data();
        kernels->rows[bits](plan, packed + row * bytes, scales, zeros, levels, float_row);
        if (dtype == kBfloat16) {
          kernels->floats_to_bfloats(float_row, half_row, n);
        } else if (dtype == kFloat16) {
          for (int64_t j = 0; j < n; ++j) half_row[j] = float_to_half(float_row[j]);
        }
      }
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
