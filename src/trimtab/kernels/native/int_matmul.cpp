// The work of one int_matmul: round the inputs, cut outputs and batch into tiles, share them among threads, scale.
#include "int_matmul.h"

#include <algorithm>
#include <new>
#include <vector>

#include "api.h"
#include "simple.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kPanelBytes = 256 << 10;    // packed rows that stay in the second-level cache between batch tiles
constexpr int64_t kPanelRows = 12;            // a panel is a multiple of them: whole tiles of 2, 3 or 4 rows
constexpr int64_t kInputBytes = 8 << 20;      // rounded inputs that one pass over the weight takes
constexpr int64_t kSerialProducts = 1 << 17;  // below this, starting threads costs more than they save

const IntKernels* int_kernels_for(int32_t isa) {
  if (isa == TT_ISA_BEST || isa == TT_ISA_AVX512_BF16) {
    if (const IntKernels* kernels = int_avx512_vnni_kernels()) return kernels;
  }
  using Table = const IntKernels* (*)();
  static constexpr Table tables[] = {int_scalar_kernels, int_avx2_kernels, int_avx512_kernels};
  for (isa = isa == TT_ISA_BEST ? TT_ISA_AVX512 : std::min<int32_t>(isa, TT_ISA_AVX512); isa >= TT_ISA_SCALAR; --isa) {
    if (const IntKernels* kernels = tables[isa]()) return kernels;
  }
  return nullptr;
}

int width_index(int64_t remaining) { return remaining >= 8 ? 3 : remaining >= 4 ? 2 : remaining >= 2 ? 1 : 0; }

// f(first, index) for each tile of kWidths[index] batch rows.
template <class F>
void each_tile(int64_t batch, F&& f) {
  for (int64_t first = 0, index; first < batch; first += kWidths[index]) f(first, int(index = width_index(batch - first)));
}

struct Scratch {
  std::vector<int8_t> inputs, ones, rounded, gathered;
  std::vector<float> floats;
  std::vector<IntScale> scales;
  std::vector<int32_t> sums, row_sums;
};
thread_local Scratch scratch;  // kept between calls: a call allocates nothing once the sizes have been seen

int8_t* aligned(std::vector<int8_t>& bytes, int64_t size) {
  bytes.resize(size_t(size + 64));
  return bytes.data() + (64 - reinterpret_cast<uintptr_t>(bytes.data()) % 64) % 64;
}

struct Job {
  const tt_int_problem& p;
  const IntKernels& kernels;
  const uint8_t* x;
  const uint8_t* packed;
  const void* scales;
  const void* index;
  const int32_t* row_sums;  // null: computed where they are needed
  uint8_t* out;
  IntRounding rounding;

  int64_t per_block() const { return int64_t(kLanes) * codes_per_lane(p.bits); }
  int64_t blocks() const { return p.in_features / per_block(); }
  int64_t tail_lanes() const {
    return (p.in_features % per_block() + codes_per_lane(p.bits) - 1) / codes_per_lane(p.bits);
  }
  int64_t row_bytes() const { return 2 * words_per_lane(p.bits) * (blocks() * kLanes + tail_lanes()); }
  // Bytes of one row of inputs: whole blocks.
  int64_t input_bytes() const { return (blocks() + (tail_lanes() > 0)) * per_block(); }
  int64_t element() const { return p.x_dtype == kFloat32 ? 4 : 2; }
  bool wants_row_sums() const { return !rounding.symmetric && !row_sums; }
};

template <class T>
void gather(const T* index, const int8_t* from, int64_t n, int8_t* to) {
  for (int64_t i = 0; i < n; ++i) to[i] = from[index[i]];
}

template <class T>
bool within(const T* index, int64_t n, int64_t width) {
  bool good = true;
  for (int64_t i = 0; i < n; ++i) good &= index[i] >= 0 && index[i] < width;
  return good;
}

// Row `row` of x, rounded and gathered, into its place among the inputs of its tile; its scale and sum beside it.
void prepare_row(const Job& job, int64_t row, const IntPlace& place, IntScale& scale, int32_t& sum) {
  const tt_int_problem& p = job.p;
  const uint8_t* x = job.x + row * p.width * job.element();
  const float* floats = reinterpret_cast<const float*>(x);
  if (p.x_dtype != kFloat32) {
    scratch.floats.resize(size_t(p.width));
    job.kernels.to_floats(p.x_dtype, x, p.width, scratch.floats.data());
    floats = scratch.floats.data();
  }
  // What `place` reads past the inputs is zero.
  scratch.rounded.assign(size_t(std::max(p.width, job.input_bytes())), 0);
  int8_t* q = scratch.rounded.data();
  scale = job.kernels.round(job.rounding, floats, p.width, q);
  if (job.index) {
    scratch.gathered.assign(size_t(job.input_bytes()), 0);
    int8_t* to = scratch.gathered.data();
    if (p.index_bytes == 4) {
      gather(static_cast<const int32_t*>(job.index), q, p.in_features, to);
    } else {
      gather(static_cast<const int64_t*>(job.index), q, p.in_features, to);
    }
    q = to;
  }
  sum = job.kernels.sum(q, p.in_features);
  job.kernels.place[bits_index(p.bits)](q, place);
}

// The inputs of a chunk of batch rows, as the tiles want them.
struct Inputs {
  const int8_t* x;
  const IntScale* scales;
  const int32_t* sums;
};

// Sums of code * x of outputs [begin, end) with one tile of inputs. The rows of a tile lie far apart, so that each of its
// memory streams is as long as the panel allows. f(output row, its sums).
template <class F>
void run_rows(const Job& job, const int8_t* x, int index, int64_t begin, int64_t end, F&& f) {
  const int bits = bits_index(job.p.bits), rows = job.kernels.tile_rows[bits][index], width = kWidths[index];
  int32_t sums[kMaxTileRows * 8];
  auto run = [&](IntTileKernel kernel, int64_t row, int count, int64_t apart) {
    const int64_t bytes = job.row_bytes();
    kernel({job.packed + row * bytes, apart * bytes, job.blocks(), job.tail_lanes(), x, sums});
    for (int r = 0; r < count; ++r) f(row + r * apart, sums + r * width);
  };
  const int64_t apart = (end - begin) / rows;
  for (int64_t i = 0; i < apart; ++i) run(job.kernels.tiles[bits][index], begin + i, rows, apart);
  for (int64_t row = begin + apart * rows; row < end; ++row) run(job.kernels.single[bits][index], row, 1, 0);
}

float load_scale(const tt_int_problem& p, const void* scales, int64_t at) {
  if (p.scale_dtype == kFloat32) return static_cast<const float*>(scales)[at];
  const uint16_t value = static_cast<const uint16_t*>(scales)[at];
  return p.scale_dtype == kFloat16 ? half_to_float(value) : bfloat16_to_float(value);
}

void store(int32_t dtype, void* out, int64_t at, float value) {
  if (dtype == kFloat32) {
    static_cast<float*>(out)[at] = value;
  } else {
    static_cast<uint16_t*>(out)[at] = dtype == kFloat16 ? float_to_half(value) : float_to_bfloat16(value);
  }
}

// Outputs [begin, end) of `batch` rows of x from row `first_row`, whose inputs are prepared.
void run_panel(const Job& job, const Inputs& inputs, int64_t first_row, int64_t batch, int64_t begin, int64_t end) {
  const tt_int_problem& p = job.p;
  const uint32_t middle = 1u << (p.bits - 1);
  const double x_middle = 1 << (p.x_bits - 1);
  const int32_t* row_sums = job.row_sums;
  if (job.wants_row_sums()) {
    scratch.row_sums.resize(size_t(end - begin));
    run_rows(job, scratch.ones.data(), 0, begin, end, [&](int64_t row, const int32_t* sums) {
      scratch.row_sums[size_t(row - begin)] = int32_t(uint32_t(sums[0]) - middle * uint32_t(p.in_features));
    });
    row_sums = scratch.row_sums.data() - begin;
  }
  each_tile(batch, [&](int64_t first, int index) {
    const int8_t* x = inputs.x + first * job.input_bytes();
    run_rows(job, x, index, begin, end, [&](int64_t row, const int32_t* sums) {
      const float weight_scale = load_scale(p, job.scales, row);
      for (int b = 0; b < kWidths[index]; ++b) {
        const IntScale scale = inputs.scales[first + b];
        // Partial sums may wrap, the whole does not.
        const int32_t sum = int32_t(uint32_t(sums[b]) - middle * uint32_t(inputs.sums[first + b]));
        const float exact = p.x_symmetric ? float(sum) : float(sum - (double(scale.zero) - x_middle) * row_sums[row]);
        store(p.x_dtype, job.out, (first_row + first + b) * p.out_features + row, exact * weight_scale * scale.scale);
      }
    });
  });
}

void run_job(const Job& job, int64_t batch, int threads) {
  const tt_int_problem& p = job.p;
  const int64_t bytes = job.input_bytes(), together = std::max<int64_t>(8, kInputBytes / bytes / 8 * 8);
  const int64_t most = std::min(batch, together);
  int8_t* x = aligned(scratch.inputs, most * bytes);
  scratch.scales.resize(size_t(most));
  scratch.sums.resize(size_t(most));
  IntScale* scales = scratch.scales.data();
  int32_t* sums = scratch.sums.data();
  parallel(threads, [&](int id, int count, auto barrier) {
    if (job.wants_row_sums()) {
      scratch.rounded.assign(size_t(bytes), 0);
      std::fill_n(scratch.rounded.begin(), p.in_features, int8_t(1));
      scratch.ones.resize(size_t(bytes));
      job.kernels.place[bits_index(p.bits)](scratch.rounded.data(), {job.blocks(), job.tail_lanes(), 1, scratch.ones.data()});
    }
    const int64_t begin = p.out_features * id / count, end = p.out_features * (id + 1) / count;
    for (int64_t start = 0; start < batch; start += together) {
      const int64_t size = std::min(together, batch - start);
      if (start) barrier();  // the inputs before these are no longer read
      each_tile(size, [&](int64_t first, int index) {
        for (int64_t b = first; b < first + kWidths[index]; ++b) {
          if (b % count != id) continue;
          int8_t* at = x + first * bytes + (b - first) * kPlaneBytes;
          prepare_row(job, start + b, {job.blocks(), job.tail_lanes(), kWidths[index], at}, scales[b], sums[b]);
        }
      });
      barrier();
      const bool once = width_index(size) != 3 && size == kWidths[width_index(size)] && !job.wants_row_sums();
      const int64_t panel = once ? end - begin : std::max(kPanelRows, kPanelBytes / job.row_bytes() / kPanelRows * kPanelRows);
      for (int64_t row = begin; row < end; row += panel) {
        run_panel(job, {x, scales, sums}, start, size, row, std::min(row + panel, end));
      }
    }
  });
}

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_int_matmul(const tt_int_problem* problem, const void* x, const void* packed, const void* scales,
                                 const void* index, const int32_t* row_sums, void* out, int64_t batch, float x_scale,
                                 int32_t threads) {
  using namespace trimtab;
  const tt_int_problem& p = *problem;
  const IntKernels* kernels = int_kernels_for(p.isa);
  if (!kernels) return TT_NO_ISA;
  if (index && !(p.index_bytes == 4 ? within(static_cast<const int32_t*>(index), p.in_features, p.width)
                                    : within(static_cast<const int64_t*>(index), p.in_features, p.width))) {
    return TT_BAD_INDEX;
  }
  try {
    const Job job{p,        *kernels, static_cast<const uint8_t*>(x), static_cast<const uint8_t*>(packed), scales, index,
                  row_sums, static_cast<uint8_t*>(out), {p.x_bits, p.x_symmetric != 0, x_scale}};
    const bool serial = batch * p.out_features * p.in_features < kSerialProducts;
    run_job(job, batch, serial ? 1 : threads);
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}
