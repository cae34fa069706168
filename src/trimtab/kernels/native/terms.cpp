// What a compressed product may have added to it, for few rows of x, in place: out += (x R^T) L^T, and out += x S^T.
//
// Both take x in any dtype of out. The low-rank term multiplies in the 16-bit format of its factors, with the kernels
// of half_linear: x is brought there by an exact power of two per row that keeps it in range. The sparse term gathers
// inputs in float32. Every sum is float32 and is rounded once, when it is added to out.
#include <algorithm>
#include <cmath>
#include <new>
#include <vector>

#include "api.h"
#include "half_linear.h"
#include "simple.h"
#include "sparse_row.h"
#include "threads.h"

namespace trimtab {
namespace {

enum Dtype : int32_t { kFloat32 = 0, kFloat16 = 1, kBfloat16 = 2 };
constexpr int64_t kSerialProducts = 1 << 16;  // below this, starting threads costs more than they save

float load(const void* from, int32_t dtype, int64_t at) {
  if (dtype == kFloat32) return static_cast<const float*>(from)[at];
  const uint16_t value = static_cast<const uint16_t*>(from)[at];
  return dtype == kFloat16 ? half_to_float(value) : bfloat16_to_float(value);
}

uint16_t narrow(float value, int32_t dtype) {
  return dtype == kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
}

void add(void* out, int32_t dtype, int64_t at, float value) {
  const float sum = load(out, dtype, at) + value;
  if (dtype == kFloat32) {
    static_cast<float*>(out)[at] = sum;
  } else {
    static_cast<uint16_t*>(out)[at] = narrow(sum, dtype);
  }
}

// The largest magnitude of `n` numbers brought to [1, 2) times 2^10 by an exact factor, which is returned; 1 if they
// are all zero or not all finite, so that what is not finite stays so.
float factor_for(float largest) {
  if (!(largest > 0) || !std::isfinite(largest)) return 1;
  return std::ldexp(1.0f, std::clamp(10 - std::ilogb(largest), -126, 126));
}

// Rows [begin, end) of weight [.][n] times x [rows][n], each result given to `store(row of weight, row of x, sum)`.
template <class Store>
void multiply(const HalfKernels& kernels, const uint16_t* x, int64_t rows, const uint16_t* weight, int64_t n,
              int64_t begin, int64_t end, Store&& store) {
  auto run = [&](HalfTileKernel kernel, int64_t row, int size, int64_t apart) {
    float sums[4 * kHalfRows];
    kernel({x, weight + row * n, apart * n, n, sums});
    for (int r = 0; r < size; ++r) {
      for (int64_t b = 0; b < rows; ++b) store(row + r * apart, b, sums[r * rows + b]);
    }
  };
  const int together = kernels.rows[rows - 1];
  const int64_t apart = (end - begin) / together;
  for (int64_t i = 0; i < apart; ++i) run(kernels.tiles[rows - 1], begin + i, together, apart);
  for (int64_t row = begin + apart * together; row < end; ++row) run(kernels.single[rows - 1], row, 1, 0);
}

struct Scratch {
  std::vector<uint16_t> inputs, inner;
  std::vector<float> sums, wide;
};
thread_local Scratch scratch;  // kept between calls

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_low_rank_add(const tt_term_problem* problem, const void* x, const void* right, const void* left,
                                   void* out, int64_t rows, int32_t threads) {
  using namespace trimtab;
  const tt_term_problem& p = *problem;
  const int64_t n = p.in_features, rank = p.size;
  const HalfKernels* kernels = half_kernels_for(p.isa, p.dtype == kBfloat16);
  if (!kernels) return TT_NO_ISA;
  try {
    float undo[kHalfRows];
    scratch.inputs.resize(size_t(rows * n));
    scratch.inner.resize(size_t(rows * rank));
    scratch.sums.resize(size_t(rows * rank));
    uint16_t *inputs = scratch.inputs.data(), *inner = scratch.inner.data();
    float* sums = scratch.sums.data();
    const uint16_t* narrow_x = inputs;
    for (int64_t b = 0; b < rows; ++b) undo[b] = 1;
    if (p.x_dtype == p.dtype) {
      narrow_x = static_cast<const uint16_t*>(x);
    } else {
      for (int64_t b = 0; b < rows; ++b) {
        float largest = 0;
        for (int64_t i = 0; i < n; ++i) largest = std::max(largest, std::fabs(load(x, p.x_dtype, b * n + i)));
        const float factor = factor_for(largest);
        undo[b] = 1 / factor;
        for (int64_t i = 0; i < n; ++i) inputs[b * n + i] = narrow(load(x, p.x_dtype, b * n + i) * factor, p.dtype);
      }
    }
    const bool serial = (n + p.out_features) * rank < kSerialProducts;
    parallel(serial ? 1 : threads, [&](int id, int count, auto barrier) {
      multiply(*kernels, narrow_x, rows, static_cast<const uint16_t*>(right), n, rank * id / count,
               rank * (id + 1) / count, [&](int64_t r, int64_t b, float sum) { sums[b * rank + r] = sum; });
      barrier();
      if (id == 0) {
        for (int64_t b = 0; b < rows; ++b) {
          float largest = 0;
          for (int64_t r = 0; r < rank; ++r) largest = std::max(largest, std::fabs(sums[b * rank + r]));
          const float factor = factor_for(largest);
          undo[b] /= factor;
          for (int64_t r = 0; r < rank; ++r) inner[b * rank + r] = narrow(sums[b * rank + r] * factor, p.dtype);
        }
      }
      barrier();
      multiply(*kernels, inner, rows, static_cast<const uint16_t*>(left), rank, p.out_features * id / count,
               p.out_features * (id + 1) / count, [&](int64_t o, int64_t b, float sum) {
                 add(out, p.x_dtype, b * p.out_features + o, sum * undo[b]);
               });
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}

extern "C" int32_t tt_sparse_add(const tt_term_problem* problem, const void* x, const void* values,
                                 const int32_t* columns, const int32_t* offsets, void* out, int64_t rows,
                                 int32_t threads) {
  using namespace trimtab;
  const tt_term_problem& p = *problem;
  const int64_t n = p.in_features;
  const SparseRow row = sparse_row_for(p.isa, p.dtype);
  try {
    const float* wide = static_cast<const float*>(x);
    if (p.x_dtype != kFloat32) {
      scratch.wide.resize(size_t(rows * n));
      for (int64_t i = 0; i < rows * n; ++i) scratch.wide[size_t(i)] = load(x, p.x_dtype, i);
      wide = scratch.wide.data();
    }
    const int64_t width = p.dtype == kFloat32 ? 4 : 2;
    parallel(p.size * rows < kSerialProducts / 4 ? 1 : threads, [&](int id, int count, auto) {
      for (int64_t o = p.out_features * id / count; o < p.out_features * (id + 1) / count; ++o) {
        const int64_t begin = offsets[o], entries = offsets[o + 1] - begin;
        if (!entries) continue;
        const uint8_t* own = static_cast<const uint8_t*>(values) + begin * width;
        for (int64_t b = 0; b < rows; ++b) {
          add(out, p.x_dtype, b * p.out_features + o, row(own, columns + begin, entries, wide + b * n));
        }
      }
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
