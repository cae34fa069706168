// The work of sparse_matmul: bring x to what the kernels read, share the output rows among threads, round once.
#include "bitmap_matmul.h"

#include <new>

#include "numbers.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialBytes = 1 << 16;  // below this, starting threads costs more than they save
enum Dtype : int32_t { kFloat32 = 0, kBfloat16 = 2 };

const BitmapKernels* bitmap_kernels_for(int32_t dtype, int32_t x_dtype, int32_t isa) {
  using Table = const BitmapKernels* (*)(int32_t);
  static constexpr Table tables[] = {bitmap_scalar, bitmap_avx2, bitmap_avx512};
  isa = isa == TT_ISA_BEST ? TT_ISA_AVX512_BF16 : isa;
  if (isa == TT_ISA_AVX512_BF16 && x_dtype == kBfloat16 && tt_has_isa(isa)) {
    if (const BitmapKernels* kernels = bitmap_avx512_bf16(dtype)) return kernels;
  }
  for (isa = std::min<int32_t>(isa, TT_ISA_AVX512); isa >= TT_ISA_SCALAR; --isa) {
    const BitmapKernels* kernels = tables[isa](dtype);
    if (kernels && tt_has_isa(isa)) return kernels;
  }
  return nullptr;
}

int64_t width_of(int32_t dtype) { return dtype == kFloat32 ? 4 : 2; }

struct Scratch {
  std::vector<float> floats;
  std::vector<uint16_t> bfloats, split;
};
thread_local Scratch scratch;  // kept between calls
thread_local std::vector<SparseJob> planned;

// x [rows][n] as the kernels read it, each row filled up with zeros to whole words; every thread makes its own.
const void* prepared(BitmapInputs inputs, const void* x, int32_t dtype, int64_t rows, int64_t n) {
  const int64_t padded = (n + kWordColumns - 1) / kWordColumns * kWordColumns;
  if (inputs != kFloats) {
    if (inputs == kBfloats && padded == n) return x;
    std::vector<uint16_t>& own = inputs == kBfloats ? scratch.bfloats : scratch.split;
    own.assign(size_t(rows * padded), 0);
    for (int64_t b = 0; b < rows; ++b) {
      const uint16_t* from = static_cast<const uint16_t*>(x) + b * n;
      uint16_t* to = own.data() + b * padded;
      for (int64_t i = 0; i < n; ++i) {
        const int64_t column = i % kWordColumns, half = kWordColumns / 2;
        to[inputs == kBfloats ? i : i - column + column % 2 * half + column / 2] = from[i];
      }
    }
    return own.data();
  }
  if (dtype == kFloat32 && padded == n) return x;
  scratch.floats.assign(size_t(rows * padded), 0.0f);
  for (int64_t b = 0; b < rows; ++b) {
    for (int64_t i = 0; i < n; ++i) scratch.floats[size_t(b * padded + i)] = load_number(x, dtype, b * n + i);
  }
  return scratch.floats.data();
}

// Outputs [begin, end) of one weight. The rows of a tile lie far apart, so that each of its memory streams is as long as
// it can be.
void run_rows(const SparseJob& job, const void* inputs, int32_t dtype, int64_t rows, int64_t begin, int64_t end) {
  const tt_sparse_weight& weight = *job.weight;
  const int64_t outputs = weight.out_features, words = job.words(), entries = weight.offsets[outputs];
  const int64_t number = weight.dtype == kCodes ? 1 : width_of(weight.dtype);
  const int64_t group = weight.scales ? weight.group_size : words * kWordColumns;
  const int64_t groups = (weight.in_features + group - 1) / group;
  auto run = [&](const BitmapKernel (&by_care)[2], int64_t row, int size, int64_t apart) {
    float sums[kBitmapTileRows * kBitmapRows];
    BitmapTile tile{inputs, weight.bitmap + row * words, apart * words, words, group / kWordColumns, {}, {}, sums};
    bool careful = false;
    for (int r = 0; r < size; ++r) {
      const int64_t at = row + r * apart;
      tile.values[r] = static_cast<const char*>(weight.values) + weight.offsets[at] * number;
      tile.scales[r] = weight.scales ? weight.scales + at * groups : nullptr;
      careful |= weight.offsets[at + 1] + kBitmapOverread > entries;
    }
    by_care[careful](tile);
    for (int r = 0; r < size; ++r) {
      for (int64_t b = 0; b < rows; ++b) {
        store_number(job.out, dtype, b * outputs + row + r * apart, sums[r * rows + b]);
      }
    }
  };
  const BitmapKernels& kernels = *job.kernels;
  const int together = kernels.rows[rows - 1];
  const int64_t apart = (end - begin) / together;
  for (int64_t i = 0; i < apart; ++i) run(kernels.tiles[rows - 1], begin + i, together, apart);
  for (int64_t row = begin + apart * together; row < end; ++row) run(kernels.single[rows - 1], row, 1, 0);
}

// The value of an entry, the `place`-th of its word, whose values begin at `from`.
float kept_number(const tt_sparse_weight& weight, int64_t row, int64_t column, int64_t from, int64_t place) {
  if (weight.dtype != kCodes) return load_number(weight.values, weight.dtype, from + place);
  const int pair = static_cast<const uint8_t*>(weight.values)[from + place / 2];
  const int code = ((place % 2 ? pair >> 4 : pair & 15) ^ 8) - 8;
  const int64_t groups = (weight.in_features + weight.group_size - 1) / weight.group_size;
  return float(code) * bfloat16_to_float(weight.scales[row * groups + column / weight.group_size]);
}

}  // namespace

SparseJob sparse_job(const tt_sparse_weight& weight, int32_t dtype, int32_t isa, void* out) {
  return {&weight, bitmap_kernels_for(weight.dtype, dtype, isa), out};
}

void run_sparse(const std::vector<SparseJob>& jobs, const void* x, int32_t dtype, int64_t rows, const Team& team) {
  const void* inputs[kSplitBfloats + 1] = {};
  each_sparse_share(jobs, team.id, team.count, [&](const SparseJob& job, int64_t begin, int64_t end) {
    const BitmapInputs kind = job.kernels->inputs;
    if (!inputs[kind]) inputs[kind] = prepared(kind, x, dtype, rows, job.weight->in_features);
    run_rows(job, inputs[kind], dtype, rows, begin, end);
  });
}

}  // namespace trimtab

extern "C" int32_t tt_sparse_matmul(const tt_sparse_weight* weights, int64_t count, const void* x, void* out,
                                    int64_t rows, int32_t dtype, int32_t isa, int32_t threads) {
  using namespace trimtab;
  try {
    std::vector<SparseJob>& jobs = planned;  // of this thread, not of those that share the work
    jobs.clear();
    int64_t outputs = 0, bytes = 0;
    for (int64_t i = 0; i < count; ++i) {
      jobs.push_back(sparse_job(weights[i], dtype, isa, static_cast<char*>(out) + outputs * rows * width_of(dtype)));
      if (!jobs.back().kernels) return TT_NO_ISA;
      outputs += weights[i].out_features;
      bytes += jobs.back().bytes_before(weights[i].out_features);
    }
    parallel(bytes < kSerialBytes ? 1 : threads, [&](int id, int team, auto) {
      run_sparse(jobs, x, dtype, rows, {id, team});
    });
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}

extern "C" int32_t tt_sparse_dequantize(const tt_sparse_weight* weight, int64_t first, int64_t rows, void* out,
                                        int32_t dtype, int32_t threads) {
  using namespace trimtab;
  const tt_sparse_weight& w = *weight;
  const int64_t n = w.in_features, words = (n + kWordColumns - 1) / kWordColumns, number = width_of(dtype);
  const bool same = w.dtype == dtype;  // copied as they are, NaN payloads included
  parallel(rows * n < kSerialBytes ? 1 : threads, [&](int id, int count, auto) {
    for (int64_t row = rows * id / count; row < rows * (id + 1) / count; ++row) {
      char* own = static_cast<char*>(out) + row * n * number;
      std::fill_n(own, n * number, char(0));
      int64_t next = w.offsets[first + row];
      for (int64_t word = 0; word < words; ++word) {
        int64_t place = 0;
        for (uint64_t bits = w.bitmap[(first + row) * words + word]; bits; bits &= bits - 1, ++place) {
          const int64_t column = word * kWordColumns + __builtin_ctzll(bits);
          if (!same) {
            store_number(own, dtype, column, kept_number(w, first + row, column, next, place));
          } else if (number == 4) {
            reinterpret_cast<float*>(own)[column] = static_cast<const float*>(w.values)[next + place];
          } else {
            reinterpret_cast<uint16_t*>(own)[column] = static_cast<const uint16_t*>(w.values)[next + place];
          }
        }
        next += w.dtype == kCodes ? (place + 1) / 2 : place;
      }
    }
  });
  return TT_OK;
}
