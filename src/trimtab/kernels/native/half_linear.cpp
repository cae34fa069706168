// The work of one half_linear: choose the kernels, share the output rows among threads, add the bias, round once.
#include "half_linear.h"

#include "api.h"
#include "simple.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialWeights = 1 << 15;  // below this, starting threads costs more than they save
constexpr int32_t kBfloat16 = 2;             // of tt_linear_problem

}  // namespace

const HalfKernels* half_kernels_for(int32_t isa, bool bfloat16) {
  using Table = const HalfKernels* (*)(bool);
  static constexpr Table tables[] = {half_scalar, half_avx2, half_avx512, half_avx512_bf16};
  for (isa = isa == TT_ISA_BEST ? TT_ISA_AVX512_BF16 : isa; isa >= TT_ISA_SCALAR; --isa) {
    const HalfKernels* kernels = tables[isa](bfloat16);
    if (kernels && tt_has_isa(isa)) return kernels;
  }
  return nullptr;
}

}  // namespace trimtab

extern "C" int32_t tt_half_linear(const tt_linear_problem* problem, const void* x, const void* weight, const void* bias,
                                  void* out, int64_t rows, int32_t threads) {
  using namespace trimtab;
  const int64_t outputs = problem->out_features, inputs = problem->in_features;
  const bool bfloat16 = problem->dtype == kBfloat16;
  const HalfKernels* kernels = half_kernels_for(problem->isa, bfloat16);
  if (!kernels) return TT_NO_ISA;
  const auto* weights = static_cast<const uint16_t*>(weight);
  const auto* biases = static_cast<const uint16_t*>(bias);
  auto* outs = static_cast<uint16_t*>(out);
  const int together = kernels->rows[rows - 1];
  parallel(outputs * inputs < kSerialWeights ? 1 : threads, [&](int id, int count, auto) {
    const int64_t begin = outputs * id / count, end = outputs * (id + 1) / count;
    auto run = [&](HalfTileKernel kernel, int64_t row, int size, int64_t apart) {
      float sums[4 * kHalfRows];
      kernel({static_cast<const uint16_t*>(x), weights + row * inputs, apart * inputs, inputs, sums});
      for (int r = 0; r < size; ++r) {
        const int64_t at = row + r * apart;
        const float shift = !biases ? 0 : bfloat16 ? bfloat16_to_float(biases[at]) : half_to_float(biases[at]);
        for (int64_t b = 0; b < rows; ++b) {
          const float value = sums[r * rows + b] + shift;
          outs[b * outputs + at] = bfloat16 ? float_to_bfloat16(value) : float_to_half(value);
        }
      }
    };
    // The rows of a tile lie far apart, so that each of its memory streams is as long as it can be.
    const int64_t apart = (end - begin) / together;
    for (int64_t i = 0; i < apart; ++i) run(kernels->tiles[rows - 1], begin + i, together, apart);
    for (int64_t row = begin + apart * together; row < end; ++row) run(kernels->single[rows - 1], row, 1, 0);
  });
  return TT_OK;
}
