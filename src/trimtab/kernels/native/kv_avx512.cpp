// kv_attention for AVX-512 F, BW, DQ, VL and F16C; called only where cpuid shows them.
#include "kv_kernels.h"

#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "kv_vector_avx512.h"

namespace trimtab {

const KvKernels* kv_avx512_kernels() {
  static constexpr KvKernels kernels = kv_kernels<KvAvx512>();
  return avx512_kernels() ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const KvKernels* kv_avx512_kernels() { return nullptr; }
}  // namespace trimtab
#endif
