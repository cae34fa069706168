// The work of one codebook_matmul: prepare inputs and codebooks, share output rows among threads, scale.
#include "codebook_matmul.h"

#include <algorithm>
#include <new>
#include <vector>

#include "api.h"
#include "grid_matmul.h"
#include "simple.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialCodes = 1 << 14;  // below this, starting threads costs more than they save
constexpr int64_t kByteEntries = 256;      // of codebooks for codes of one byte: no code is beyond them

const CodebookKernels* codebook_kernels_for(int32_t isa) {
  using Table = const CodebookKernels* (*)();
  static constexpr Table tables[] = {codebook_scalar_kernels, codebook_avx2_kernels, codebook_avx512_kernels};
  for (isa = isa == TT_ISA_BEST ? TT_ISA_AVX512 : std::min<int32_t>(isa, TT_ISA_AVX512); isa >= TT_ISA_SCALAR; --isa) {
    if (const CodebookKernels* kernels = tables[isa]()) return kernels;
  }
  return nullptr;
}

struct Scratch {
  std::vector<float> codebooks, inputs, row;
};
thread_local Scratch scratch;  // kept between calls: a call allocates nothing once the sizes have been seen

// What all tiles of a call share. `scratch` is the calling thread's.
CodebookTile prepared(const tt_codebook_problem& p, const CodebookKernels& kernels, const void* codebooks) {
  CodebookTile tile{};
  tile.groups = p.in_features / p.group_size;
  tile.books = p.books;
  tile.codebooks = codebooks;
  tile.entries = p.entries;
  if (p.code_bytes == 1) {
    scratch.codebooks.assign(size_t(p.books * kByteEntries * p.group_size), 0.0f);
    for (int64_t m = 0; m < p.books; ++m) {
      kernels.to_floats(kFloat16, static_cast<const uint16_t*>(codebooks) + m * p.entries * p.group_size,
                        p.entries * p.group_size, scratch.codebooks.data() + m * kByteEntries * p.group_size);
    }
    tile.codebooks = scratch.codebooks.data();
    tile.entries = kByteEntries;
  }
  return tile;
}

const uint8_t* codes_of_row(const tt_codebook_problem& p, const CodebookTile& tile, const void* codes, int64_t row) {
  return static_cast<const uint8_t*>(codes) + row * tile.groups * tile.books * p.code_bytes;
}

int group_index(int32_t group) { return group == 4 ? 0 : group == 8 ? 1 : 2; }

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_codebook_matmul(const tt_codebook_problem* problem, const void* x, const void* codes,
                                      const void* codebooks, const void* scales, void* out, int64_t batch,
                                      int32_t threads) {
  using namespace trimtab;
  const tt_codebook_problem& p = *problem;
  const CodebookKernels* kernels = codebook_kernels_for(p.isa);
  if (!kernels) return TT_NO_ISA;
  try {
    const CodebookTile shared = prepared(p, *kernels, codebooks);
    const int w = batch > 1, width = kCodebookWidths[w], wide = p.code_bytes - 1;
    const int64_t n = p.in_features, element = p.x_dtype == kFloat32 ? 4 : 2, padded = (batch + width - 1) / width * width;
    scratch.inputs.assign(size_t(padded * n), 0.0f);
    kernels->to_floats(p.x_dtype, x, batch * n, scratch.inputs.data());
    const float* inputs = scratch.inputs.data();
    const auto& tiles = kernels->tiles[wide][group_index(p.group_size)];
    const auto& single = kernels->single[wide][group_index(p.group_size)];
    const bool serial = p.out_features * shared.groups * shared.books < kSerialCodes;
    parallel(serial ? 1 : threads, [&](int id, int count, auto) {
      float sums[kMaxCodebookSums];
      auto run = [&](CodebookKernel kernel, int64_t row, int rows, int64_t first) {
        CodebookTile tile = shared;
        tile.codes = codes_of_row(p, shared, codes, row);
        tile.row_step = shared.groups * shared.books;
        tile.x = inputs + first * n;
        tile.x_step = n;
        tile.out = sums;
        kernel(tile);
        for (int r = 0; r < rows; ++r) {
          float scale;
          kernels->to_floats(p.scale_dtype, static_cast<const uint8_t*>(scales) + (row + r) * (p.scale_dtype ? 2 : 4), 1,
                             &scale);
          for (int64_t b = 0; b < width && first + b < batch; ++b) {
            uint8_t* at = static_cast<uint8_t*>(out) + ((first + b) * p.out_features + row + r) * element;
            kernels->from_floats(p.x_dtype, sums + r * width + b, scale, 1, at);
          }
        }
      };
      const int64_t begin = p.out_features * id / count, end = p.out_features * (id + 1) / count;
      const int rows = kernels->rows[w];
      for (int64_t row = begin; row < end;) {
        const bool whole = row + rows <= end;
        for (int64_t first = 0; first < batch; first += width) {
          run(whole ? tiles[w] : single[w], row, whole ? rows : 1, first);
        }
        row += whole ? rows : 1;
      }
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}

extern "C" int32_t tt_codebook_dequantize(const tt_codebook_problem* problem, const void* codes, const void* codebooks,
                                          const void* scales, void* out, int64_t rows, int32_t threads) {
  using namespace trimtab;
  const tt_codebook_problem& p = *problem;
  const CodebookKernels* kernels = codebook_kernels_for(p.isa);
  if (!kernels) return TT_NO_ISA;
  try {
    const CodebookTile shared = prepared(p, *kernels, codebooks);
    const int64_t n = p.in_features, element = p.x_dtype == kFloat32 ? 4 : 2;
    const CodebookKernel decode = kernels->decode[p.code_bytes - 1][group_index(p.group_size)];
    parallel(rows * shared.groups * shared.books < kSerialCodes ? 1 : threads, [&](int id, int count, auto) {
      scratch.row.resize(size_t(n));
      CodebookTile tile = shared;
      tile.out = scratch.row.data();
      for (int64_t row = rows * id / count; row < rows * (id + 1) / count; ++row) {
        tile.codes = codes_of_row(p, shared, codes, row);
        decode(tile);
        float scale;
        kernels->to_floats(p.scale_dtype, static_cast<const uint8_t*>(scales) + row * (p.scale_dtype ? 2 : 4), 1, &scale);
        kernels->from_floats(p.x_dtype, tile.out, scale, n, static_cast<uint8_t*>(out) + row * n * element);
      }
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
