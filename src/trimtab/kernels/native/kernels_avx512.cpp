// AVX-512 with float32 inputs. Compiled for AVX-512 F, BW, DQ, VL and F16C; called only where cpuid shows them.
#include "grid_fma.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "vector_avx512.h"

namespace trimtab {

const Kernels* avx512_kernels() {
  static constexpr Kernels kernels = fma_kernels<Avx512>("avx512");
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
