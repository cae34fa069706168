// One block of Llama's form while decoding, in two calls around attention: what stands between the products is too short
// for a call of its own.
//
//   before: norm -> q, k, v -> biases -> norms of heads -> rotary embedding
//   after:  o -> + x -> norm -> gate, up -> silu(gate) * up -> down -> + what went into the norm
//
// Each runs in one team of threads. grid_matmul, sparse_matmul and gather_matmul compute the products; a thread finishes
// the rows that it computed.
#include <deque>
#include <new>

#include "api.h"
#include "bitmap_matmul.h"
#include "block_rows.h"
#include "gather_matmul.h"
#include "grid_job.h"
#include "grid_plan.h"
#include "low_rank.h"
#include "numbers.h"
#include "sparse_row.h"
#include "threads.h"

namespace trimtab {
namespace {

constexpr int64_t kSerialProducts = 1 << 17;  // below this, starting threads costs more than they save

const BlockRows* block_rows_for(int32_t isa, int32_t dtype) {
  using Table = const BlockRows* (*)(int32_t);
  static constexpr Table tables[] = {block_rows_scalar, block_rows_avx2, block_rows_avx512, block_rows_avx512};
  for (isa = isa == TT_ISA_BEST ? TT_ISA_AVX512 : isa; isa >= TT_ISA_SCALAR; --isa) {
    const BlockRows* rows = tables[isa](dtype);
    if (rows && tt_has_isa(isa)) return rows;
  }
  return nullptr;
}

// A step of one block by one team.
struct Step {
  const tt_block& block;
  const Kernels& kernels;
  const BlockRows& rows;
  const HalfKernels* halves[3];  // by dtype of factors
  int64_t count;                 // rows of x
  int64_t width;                 // bytes of a number

  int64_t hidden() const { return block.q.weight.in_features; }
  uint8_t* at(void* from, int64_t numbers) const { return static_cast<uint8_t*>(from) + numbers * width; }
  const uint8_t* at(const void* from, int64_t numbers) const {
    return static_cast<const uint8_t*>(from) + numbers * width;
  }
};

LowRank low_rank(const tt_block_linear& layer, const tt_block_term& term) {
  return {static_cast<const uint16_t*>(term.right), static_cast<const uint16_t*>(term.left),
          layer.weight.in_features, layer.weight.out_features, term.rank, term.dtype};
}

thread_local std::vector<float> wide;  // x in float32, for sparse terms

// Layers that read one input, and where their outputs [rows][out] go.
struct Site {
  const tt_block_linear* layers[3];
  void* outs[3];
  int64_t size = 0;
  Products products;                // of grids
  std::vector<SparseJob> sparse;    // of bitmaps
  GatherWork gather;                // of columns
  std::deque<LowRankState> states;  // of the low-rank terms in their order

  void plan(const Step& step, const void* x) {
    size_t grids = 0;
    sparse.clear();
    gather.jobs.clear();
    for (int64_t i = 0; i < size; ++i) grids += !layers[i]->sparse.bitmap && !layers[i]->gather.columns;
    products.size(grids);
    for (int64_t i = 0, place = 0; i < size; ++i) {
      if (layers[i]->sparse.bitmap) {
        sparse.push_back(sparse_job(layers[i]->sparse, step.block.dtype, step.block.isa, outs[i]));
      } else if (layers[i]->gather.columns) {
        gather.add(layers[i]->gather, step.block.isa, outs[i]);
      } else {
        plan_job(products, call(step, x), size_t(place++), layers[i]->weight, outs[i]);
      }
    }
    gather.size(step.count);
    place_inputs(products, call(step, x));
    each_low_rank([&](const LowRank& term, LowRankState& state) { state.size(term, step.count); });
  }
  Call call(const Step& step, const void* x) const {
    return {step.kernels, static_cast<const uint8_t*>(x), step.block.dtype, step.count, layers[0]->weight.in_features};
  }
  template <class F>
  void each_low_rank(F&& f) {
    size_t place = 0;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t t = 0; t < layers[i]->term_count; ++t) {
        const tt_block_term& term = layers[i]->terms[t];
        if (!term.right) continue;
        if (place == states.size()) states.emplace_back();
        f(low_rank(*layers[i], term), states[place++]);
      }
    }
  }
  // Products, terms and biases, and `plus` [rows][out] if it is given. Complete after the team's next wait.
  void run(const Step& step, const void* x, const void* plus, const Team& team) {
    bool inner = false;
    each_low_rank([&](const LowRank& term, LowRankState& state) {
      inner = true;
      narrow_inputs(term, state, x, step.block.dtype, step.count, team);
      inner_product(*step.halves[term.dtype], term, state, x, step.block.dtype, step.count, team);
    });
    run_packed(call(step, x), products, team);
    run_sparse(sparse, x, step.block.dtype, step.count, team);
    run_gather(gather, x, step.block.dtype, step.count, team);
    if (inner) team.wait();  // for the inner products of the others
    widen(step, x);
    auto finish_job = [&](const auto& job, int64_t begin, int64_t end) { finish(step, job.out, plus, begin, end); };
    each_share(products.jobs, team.id, team.count, finish_job);
    each_sparse_share(sparse, team.id, team.count, finish_job);
    each_gather_share(gather.jobs, team.id, team.count, finish_job);
  }

 private:
  void widen(const Step& step, const void* x) const {
    bool wanted = false;
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t t = 0; t < layers[i]->term_count; ++t) wanted = wanted || layers[i]->terms[t].values;
    }
    if (!wanted) return;
    const int64_t count = step.count * layers[0]->weight.in_features;
    wide.resize(size_t(count));
    for (int64_t i = 0; i < count; ++i) wide[size_t(i)] = load_number(x, step.block.dtype, i);
  }
  // Outputs [begin, end) of the layer that writes to `out`.
  void finish(const Step& step, void* out, const void* plus, int64_t begin, int64_t end) {
    int64_t place = 0;
    size_t state = 0;
    for (; outs[place] != out; ++place) {
      for (int64_t t = 0; t < layers[place]->term_count; ++t) state += layers[place]->terms[t].right != nullptr;
    }
    const tt_block_linear& layer = *layers[place];
    const int64_t features = layer.weight.out_features;
    for (int64_t t = 0; t < layer.term_count; ++t) {
      const tt_block_term& term = layer.terms[t];
      if (term.right) {
        add_outer_product(*step.halves[term.dtype], low_rank(layer, term), states[state++], out, step.block.dtype,
                          step.count, begin, end);
      } else {
        add_sparse_rows(sparse_row_for(step.block.isa, term.dtype),
                        {term.values, term.columns, term.offsets, layer.weight.in_features, features, term.dtype},
                        wide.data(), out, step.block.dtype, step.count, begin, end);
      }
    }
    for (int64_t row = 0; row < step.count; ++row) {
      void* own = step.at(out, row * features + begin);
      if (layer.bias) step.rows.add(own, step.at(layer.bias, begin), own, end - begin);
      if (plus) step.rows.add(step.at(plus, row * features + begin), own, own, end - begin);
    }
  }
};

struct Scratch {
  std::vector<uint8_t> numbers;
  Site first, second, third;
};
thread_local Scratch scratch;  // kept between calls

void set(Site& site, std::initializer_list<const tt_block_linear*> layers, void* outs, const Step& step) {
  site.size = 0;
  for (const tt_block_linear* layer : layers) {
    site.layers[site.size] = layer;
    site.outs[site.size++] = outs;
    outs = step.at(outs, step.count * layer->weight.out_features);
  }
}

void norm_rows(const Step& step, const tt_block_norm& norm, const void* x, void* out, const Team& team) {
  const int64_t n = step.hidden();
  for (int64_t row = team.id; row < step.count; row += team.count) {
    step.rows.norm(step.at(x, row * n), norm.weight, norm.epsilon, step.at(out, row * n), n);
  }
}

int64_t weights_of(std::initializer_list<const tt_block_linear*> layers) {
  int64_t total = 0;
  for (const tt_block_linear* layer : layers) total += layer->weight.in_features * layer->weight.out_features;
  return total;
}

// f(step) with the kernels for a block, or why there are none.
template <class F>
int32_t with_kernels(const tt_block& block, int64_t rows, F&& f) {
  const Kernels* kernels = kernels_for(block.isa, block.dtype == kBfloat16);
  const BlockRows* between = block_rows_for(block.isa, block.dtype);
  const HalfKernels *halves = half_kernels_for(block.isa, false), *bfloats = half_kernels_for(block.isa, true);
  if (!kernels || !between || !halves || !bfloats) return TT_NO_ISA;
  try {
    f(Step{block, *kernels, *between, {nullptr, halves, bfloats}, rows, dtype_bytes(block.dtype)});
    return TT_OK;
  } catch (const std::bad_alloc&) {
    return TT_NO_MEMORY;
  }
}

}  // namespace
}  // namespace trimtab

extern "C" int32_t tt_block_before(const tt_block* block, const void* x, const void* cos, const void* sin,
                                   int64_t positions, void* out, int64_t rows, int32_t threads) {
  using namespace trimtab;
  return with_kernels(*block, rows, [&](const Step& step) {
    const tt_block& b = *block;
    scratch.numbers.resize(size_t(rows * step.hidden() * step.width));
    void* normed = scratch.numbers.data();
    Site& site = scratch.first;
    set(site, {&b.q, &b.k, &b.v}, out, step);
    site.plan(step, normed);
    const int64_t size = b.head_dim, queries = rows * b.q.weight.out_features / size;
    const int64_t heads = queries + rows * b.k.weight.out_features / size;  // keys follow the queries
    const bool serial = rows * weights_of({&b.q, &b.k, &b.v}) < kSerialProducts;
    parallel(serial ? 1 : threads, [&](int id, int count, auto) {
      const Team team{id, count};
      norm_rows(step, b.attention_norm, x, normed, team);
      team.wait();
      site.run(step, normed, nullptr, team);
      team.wait();
      for (int64_t i = heads * id / count; i < heads * (id + 1) / count; ++i) {
        const bool key = i >= queries;
        const int64_t row = key ? (i - queries) / ((heads - queries) / rows) : i / (queries / rows);
        const tt_block_norm& norm = key ? b.k_norm : b.q_norm;
        void* head = step.at(out, i * size);
        if (norm.weight) step.rows.norm(head, norm.weight, norm.epsilon, head, size);
        const int64_t position = row % positions * size;
        step.rows.rotate(head, step.at(cos, position), step.at(sin, position), size);
      }
    });
  });
}

extern "C" int32_t tt_block_after(const tt_block* block, const void* attended, const void* x, void* out, int64_t rows,
                                  int32_t threads) {
  using namespace trimtab;
  return with_kernels(*block, rows, [&](const Step& step) {
    const tt_block& b = *block;
    const int64_t hidden = step.hidden(), inner = b.gate.weight.out_features;
    scratch.numbers.resize(size_t(rows * (2 * hidden + 2 * inner) * step.width));
    void* const sum = scratch.numbers.data();  // of x and attention
    void* const normed = step.at(sum, rows * hidden);
    void* const gate = step.at(normed, rows * hidden);
    void* const up = step.at(gate, rows * inner);
    Site &first = scratch.first, &second = scratch.second, &third = scratch.third;
    set(first, {&b.o}, sum, step);
    set(second, {&b.gate, &b.up}, gate, step);
    set(third, {&b.down}, out, step);
    first.plan(step, attended);
    second.plan(step, normed);
    third.plan(step, gate);
    const bool serial = rows * weights_of({&b.o, &b.gate, &b.up, &b.down}) < kSerialProducts;
    parallel(serial ? 1 : threads, [&](int id, int count, auto) {
      const Team team{id, count};
      first.run(step, attended, x, team);
      team.wait();
      norm_rows(step, b.mlp_norm, sum, normed, team);
      team.wait();
      second.run(step, normed, nullptr, team);
      team.wait();
      const int64_t begin = rows * inner * id / count, end = rows * inner * (id + 1) / count;
      step.rows.gate(step.at(gate, begin), step.at(up, begin), step.at(gate, begin), end - begin);
      team.wait();
      third.run(step, gate, sum, team);
    });
  });
}
