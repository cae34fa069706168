// The work of one sparse_matmul: bring x to what the kernels read, share the output rows among threads, round once.
#include "bitmap_matmul.h"

#include <algorithm>
#include <new>
#include <vector>

#include "api.h"
#include "numbers.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialEntries = 1 << 15;  // below this, starting threads costs more than they save
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 2 };

const BitmapKernels* bitmap_kernels_for(const tt_sparse_problem& p) {
  using Table = const BitmapKernels* (*)(int32_t);
  static constexpr Table tables[] = {bitmap_scalar, bitmap_avx2, bitmap_avx512};
  int32_t isa = p.isa == TT_ISA_BEST ? TT_ISA_AVX512_BF16 : p.isa;
  if (isa == TT_ISA_AVX512_BF16 && p.dtype == kBfloat16 && p.x_dtype == kBfloat16 && tt_has_isa(isa)) {
    if (const BitmapKernels* kernels = bitmap_avx512_bf16()) return kernels;
  }
  for (isa = std::min<int32_t>(isa, TT_ISA_AVX512); isa >= TT_ISA_SCALAR; --isa) {
    const BitmapKernels* kernels = tables[isa](p.dtype);
    if (kernels && tt_has_isa(isa)) return kernels;
  }
  return nullptr;
}

int64_t width_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

struct Scratch {
  std::vector<float> floats;
  std::vector<uint16_t> bfloats;
};
thread_local Scratch scratch;  // kept between calls

// x [rows][in] as the kernels read it, each row filled up with zeros to whole words.
const void* prepared(const tt_sparse_problem& p, bool bfloat16, const void* x, int64_t rows, int64_t padded) {
  const int64_t n = p.in_features;
  if (bfloat16) {
    scratch.bfloats.assign(size_t(rows * padded), 0);
    for (int64_t b = 0; b < rows; ++b) {
      std::copy_n(static_cast<const uint16_t*>(x) + b * n, n, scratch.bfloats.data() + b * padded);
    }
    return scratch.bfloats.data();
  }
  scratch.floats.assign(size_t(rows * padded), 0.0f);
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < n; ++i) scratch.floats[size_t(b * padded + i)] = load_number(x, p.x_dtype, b * n + i);
  }
  return scratch.floats.data();
}

// The output row where the share of thread `id` of `count` begins, so that all have about as many entries.
int64_t share(const int32_t* offsets, int64_t outputs, int id, int count) {
  if (id == 0 || id == count) return id ? outputs : 0;
  const int64_t wanted = int64_t(offsets[outputs]) * id / count;
  return std::lower_bound(offsets, offsets + outputs, wanted) - offsets;
}

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_sparse_matmul(const tt_sparse_problem* problem, const void* x, const uint64_t* bitmap,
                                    const void* values, const int32_t* offsets, void* out, int64_t rows,
                                    int32_t threads) {
  using namespace trimtab;
  const tt_sparse_problem& p = *problem;
  const int64_t outputs = p.out_features, words = (p.in_features + kWordColumns - 1) / kWordColumns;
  const int64_t entries = offsets[outputs], number = width_of(p.dtype);
  const BitmapKernels* kernels = bitmap_kernels_for(p);
  if (!kernels) return TT_NO_ISA;
  try {
    const void* inputs = prepared(p, kernels->bfloat16_inputs, x, rows, words * kWordColumns);
    parallel(entries + outputs * words < kSerialEntries ? 1 : threads, [&](int id, int count, auto) {
      const int64_t begin = share(offsets, outputs, id, count), end = share(offsets, outputs, id + 1, count);
      // The rows of a tile lie far apart, so that each of its memory streams is as long as it can be.
      auto run = [&](const BitmapKernel (&by_care)[2], int64_t row, int size, int64_t apart) {
        float sums[kBitmapTileRows * kBitmapRows];
        BitmapTile tile{inputs, bitmap + row * words, apart * words, words, {}, sums};
        bool careful = false;
        for (int r = 0; r < size; ++r) {
          const int64_t at = row + r * apart;
          tile.values[r] = static_cast<const char*>(values) + offsets[at] * number;
          careful |= offsets[at + 1] + kBitmapOverread > entries;
        }
        by_care[careful](tile);
        for (int r = 0; r < size; ++r) {
          for (int64_t b = 0; b < rows; ++b) {
            store_number(out, p.x_dtype, b * outputs + row + r * apart, sums[r * rows + b]);
          }
        }
      };
      const int together = kernels->rows[rows - 1];
      const int64_t apart = (end - begin) / together;
      for (int64_t i = 0; i < apart; ++i) run(kernels->tiles[rows - 1], begin + i, together, apart);
      for (int64_t row = begin + apart * together; row < end; ++row) run(kernels->single[rows - 1], row, 1, 0);
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}

extern "C" int32_t tt_sparse_dequantize(const tt_sparse_problem* problem, const uint64_t* bitmap, const void* values,
                                        const int32_t* offsets, int64_t first, int64_t rows, void* out,
                                        int32_t threads) {
  using namespace trimtab;
  const tt_sparse_problem& p = *problem;
  const int64_t n = p.in_features, words = (n + kWordColumns - 1) / kWordColumns, number = width_of(p.x_dtype);
  parallel(rows * n < kSerialEntries ? 1 : threads, [&](int id, int count, auto) {
    for (int64_t row = rows * id / count; row < rows * (id + 1) / count; ++row) {
      char* own = static_cast<char*>(out) + row * n * number;
      std::fill_n(own, n * number, char(0));
      int64_t next = offsets[first + row];
      for (int64_t word = 0; word < words; ++word) {
        for (uint64_t bits = bitmap[(first + row) * words + word]; bits; bits &= bits - 1) {
          const int64_t column = word * kWordColumns + __builtin_ctzll(bits);
          if (p.dtype != p.x_dtype) {
            store_number(own, p.x_dtype, column, load_number(values, p.dtype, next));
          } else if (number == 4) {
            reinterpret_cast<float*>(own)[column] = static_cast<const float*>(values)[next];
          } else {
            reinterpret_cast<uint16_t*>(own)[column] = static_cast<const uint16_t*>(values)[next];
          }
          ++next;
        }
      }
    }
  });
  return TT_OK;
}
