// AVX-512 with float32 inputs. Compiled for AVX-512 F, BW, DQ, VL and F16C; called only where cpuid shows them.
#include "grid_fma.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "grid_rows_avx512.h"

namespace trimtab {
namespace {

constexpr Kernels make_kernels() {
  Kernels kernels = fma_kernels<Avx512>("avx512");
  fill_halves<ToHalf>(kernels.halves[0]);
  fill_halves<ToBfloat>(kernels.halves[1]);
  return kernels;
}

}  // namespace

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = make_kernels();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                 __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")
             ? &kernels
             : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const Kernels* avx512_kernels() { return nullptr; }
}  // namespace trimtab
#endif
