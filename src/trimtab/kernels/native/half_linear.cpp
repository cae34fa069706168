// The work of one half_linear: choose the kernels, share the output rows among threads, add the bias, round once.
#include "half_linear.h"

#include "api.h"
#include "numbers.h"
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
  parallel(outputs * inputs < kSerialWeights ? 1 : threads, [&](int id, int count, auto) {
    multiply_rows(*kernels, static_cast<const uint16_t*>(x), rows, weights, inputs, outputs * id / count,
                  outputs * (id + 1) / count, [&](int64_t at, int64_t b, float sum) {
                    const float value = sum + (biases ? load_number(biases, problem->dtype, at) : 0);
                    outs[b * outputs + at] = narrow_number(value, problem->dtype);
                  });
  });
  return TT_OK;
}
