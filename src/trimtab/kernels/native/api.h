// The C interface of libtrimtab_kernels. Python reads it through ctypes (library.py); change both, and TT_ABI.
#pragma once

#include <cstdint>

#define TT_ABI 1
#define TT_EXPORT extern "C" __attribute__((visibility("default")))

enum { TT_OK = 0, TT_NO_ISA = 1, TT_NO_MEMORY = 2 };

// Instruction sets, ascending. As an argument: use none above this one. TT_ISA_BEST: the best the machine has.
enum { TT_ISA_BEST = -1, TT_ISA_SCALAR = 0, TT_ISA_AVX2 = 1, TT_ISA_AVX512 = 2, TT_ISA_AVX512_BF16 = 3 };

struct tt_grid_problem {
  int64_t out_features, in_features, group_size;  // group_size divides in_features
  int32_t bits;                                   // 2, 3, 4, 8
  int32_t x_dtype, scale_dtype;                   // of x and out; of scales: 0 float32, 1 float16, 2 bfloat16
  int32_t isa;
};

TT_EXPORT int32_t tt_abi();
TT_EXPORT int32_t tt_openmp();                  // 1 if built with threads
TT_EXPORT int32_t tt_has_isa(int32_t isa);      // 1 if built for it and the machine has it

// x [batch][in], packed [out][row bytes], scales [out][groups], zeros uint8 [out][groups] or null, out [batch][out];
// all contiguous. Returns TT_OK or why not. The caller has checked shapes.
TT_EXPORT int32_t tt_grid_matmul(const tt_grid_problem* problem, const void* x, const void* packed, const void* scales,
                                 const void* zeros, void* out, int64_t batch, int32_t threads);

// The dense weight [rows][in] of the first `rows` output rows, in the problem's x_dtype.
TT_EXPORT int32_t tt_grid_dequantize(const tt_grid_problem* problem, const void* packed, const void* scales,
                                     const void* zeros, void* out, int64_t rows, int32_t threads);

// Reads `bytes` bytes, a share per thread, and returns the seconds that took.
TT_EXPORT double tt_read_seconds(const void* from, int64_t bytes, int32_t threads);

namespace trimtab {
struct Kernels;
const Kernels* kernels_for(int32_t isa, bool bfloat16_inputs);
}  // namespace trimtab
