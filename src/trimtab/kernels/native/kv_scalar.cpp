// kv_attention for any processor: plain loops over 16 lanes, which compilers turn into what the target has.
#include "kv_kernels.h"

namespace trimtab {
namespace {

struct KvScalar {
  static constexpr int W = 16;
  static constexpr bool kWholeNumbers = false;
  static constexpr int kQueries = 2;  // at most in a block
  static constexpr int kSums = 8;     // vectors of sums held at a time
  struct floats {
    float v[W];
  };

  static floats zero() { return {}; }
  static floats set1(float value) {
    floats out;
    for (float& x : out.v) x = value;
    return out;
  }
  static floats load(const float* p) {
    floats out;
    std::memcpy(out.v, p, sizeof out.v);
    return out;
  }
  static void store(float* p, const floats& v) { std::memcpy(p, v.v, sizeof v.v); }
  static floats add(floats a, const floats& b) {
    for (int i = 0; i < W; ++i) a.v[i] += b.v[i];
    return a;
  }
  static floats sub(floats a, const floats& b) {
    for (int i = 0; i < W; ++i) a.v[i] -= b.v[i];
    return a;
  }
  static floats mul(floats a, const floats& b) {
    for (int i = 0; i < W; ++i) a.v[i] *= b.v[i];
    return a;
  }
  static floats fma(const floats& a, const floats& b, floats c) {
    for (int i = 0; i < W; ++i) c.v[i] += a.v[i] * b.v[i];
    return c;
  }
  static floats div(floats a, const floats& b) {
    for (int i = 0; i < W; ++i) a.v[i] /= b.v[i];
    return a;
  }
  static floats max(const floats& a, floats b) {  // b if one is NaN
    for (int i = 0; i < W; ++i) b.v[i] = a.v[i] > b.v[i] ? a.v[i] : b.v[i];
    return b;
  }
  static floats choose_less(const floats& a, const floats& b, const floats& yes, floats no) {
    for (int i = 0; i < W; ++i) no.v[i] = a.v[i] < b.v[i] ? yes.v[i] : no.v[i];
    return no;
  }
  static floats round(floats v) {
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves no bits for fractions
    for (float& x : v.v) x = (x + kRound) - kRound;
    return v;
  }
  // 2^n for whole n in [-126, 127]; 0 for -127.
  static floats power(floats n) {
    for (float& x : n.v) x = bits_to_float(uint32_t(int32_t(x) + 127) << 23);
    return n;
  }
  static float sum(floats v) {
    for (int half = W / 2; half; half /= 2) {
      for (int i = 0; i < half; ++i) v.v[i] += v.v[i + half];
    }
    return v.v[0];
  }
  static floats sum_each(const floats (&v)[W]) {
    floats out;
    for (int i = 0; i < W; ++i) out.v[i] = sum(v[i]);
    return out;
  }
  TT_INLINE static void prefetch(const void* p) { __builtin_prefetch(p); }

  static floats load_half(const uint16_t* p) {
    floats out;
    for (int i = 0; i < W; ++i) out.v[i] = half_to_float(p[i]);
    return out;
  }
  static floats load_half(const uint16_t* p, int64_t count) {  // of fewer numbers; the others are zero
    floats out{};
    for (int64_t i = 0; i < count; ++i) out.v[i] = half_to_float(p[i]);
    return out;
  }
  static floats load_bfloat(const uint16_t* p) {
    floats out;
    for (int i = 0; i < W; ++i) out.v[i] = bfloat16_to_float(p[i]);
    return out;
  }
  static void load_bfloat_pairs(const uint16_t* p, floats& even, floats& odd) {
    for (int i = 0; i < W; ++i) {
      even.v[i] = bfloat16_to_float(p[2 * i]);
      odd.v[i] = bfloat16_to_float(p[2 * i + 1]);
    }
  }

  struct Table {
    const float* levels;
  };
  static Table table(const float* levels, int) { return {levels}; }
  // Value of the codes of tokens [16 PART, 16 PART + 16) of a row.
  template <int BITS, int PART>
  static floats decode(const uint8_t* row, const Table& table) {
    floats out;
    for (int i = 0; i < W; ++i) {
      const uint32_t code = code_at<BITS>(row, uint32_t(16 * PART + i));
      out.v[i] = BITS < 8 && table.levels ? table.levels[code] : float(int32_t(code));
    }
    return out;
  }
};

}  // namespace

const KvKernels* kv_scalar_kernels() {
  static constexpr KvKernels kernels = kv_kernels<KvScalar>();
  return &kernels;
}

}  // namespace trimtab
