// Choice of instruction set at run time, and the measure of memory bandwidth.
#include "api.h"

#include <chrono>

#include "grid_matmul.h"
#include "threads.h"

namespace trimtab {
namespace {

const Kernels* exactly(int32_t isa) {
  switch (isa) {
    case TT_ISA_SCALAR: return scalar_kernels();
    case TT_ISA_AVX2: return avx2_kernels();
    case TT_ISA_AVX512: return avx512_kernels();
    case TT_ISA_AVX512_BF16: return avx512_bf16_kernels();
    default: return nullptr;
  }
}

}  // namespace

const Kernels* kernels_for(int32_t isa, bool bfloat16_inputs) {
  if (isa == TT_ISA_BEST) isa = TT_ISA_AVX512_BF16;
  if (isa == TT_ISA_AVX512_BF16 && !bfloat16_inputs) isa = TT_ISA_AVX512;
  for (; isa >= TT_ISA_SCALAR; --isa) {
    if (const Kernels* kernels = exactly(isa)) return kernels;
  }
  return nullptr;
}

}  // namespace trimtab

using namespace trimtab;

int32_t tt_abi() { return TT_ABI; }

int32_t tt_openmp() {
#ifdef _OPENMP
  return 1;
#else
  return 0;
#endif
}

int32_t tt_has_isa(int32_t isa) { return exactly(isa) != nullptr; }

double tt_read_seconds(const void* from, int64_t bytes, int32_t threads) {
  const Kernels& kernels = *kernels_for(TT_ISA_BEST, false);
  const uint8_t* p = static_cast<const uint8_t*>(from);
  volatile uint64_t kept = 0;
  const auto start = std::chrono::steady_clock::now();
  parallel(threads, [&](int id, int count, auto) {
    const int64_t begin = bytes / 512 * id / count * 512, end = bytes / 512 * (id + 1) / count * 512;
    kept = kept ^ kernels.read_all(p + begin, end - begin);
  });
  return std::chrono::duration<double>(std::chrono::steady_clock::now() - start).count();
}
