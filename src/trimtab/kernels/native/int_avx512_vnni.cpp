// int_matmul on AVX-512 VNNI: one instruction multiplies 64 codes by 64 inputs and adds them by fours.
#include "int_matmul.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#include "int_vector_avx512.h"

namespace trimtab {
namespace {

struct IntAvx512Vnni : IntAvx512Base {
  template <int BITS>
  static sums dot(sums s, bytes codes, bytes x) {
    return _mm512_dpbusd_epi32(s, codes, x);
  }
};

}  // namespace

const IntKernels* int_avx512_vnni_kernels() {
  static constexpr IntKernels kernels = int_kernels<IntAvx512Vnni>();
  return avx512_kernels() && __builtin_cpu_supports("avx512vnni") ? &kernels : nullptr;
}

}  // namespace trimtab
#else
namespace trimtab {
const IntKernels* int_avx512_vnni_kernels() { return nullptr; }
}  // namespace trimtab
#endif
