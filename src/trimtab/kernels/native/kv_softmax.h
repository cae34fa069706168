// Scores of a chunk to softmax weights.
#pragma once

#include <algorithm>
#include <limits>

#include "kv_products.h"

namespace trimtab {
namespace {

// e^x for x <= 88, to about 1e-7; 0 below -87.7. Cody and Waite's reduction, a polynomial of degree 7 (Cephes).
template <class V>
TT_INLINE inline typename V::floats exponential(typename V::floats x) {
  auto c = [](float value) TT_INLINE { return V::set1(value); };
  const auto clipped = V::max(c(-88.0f), x);  // whose power of two is 0; NaN stays
  const auto n = V::round(V::mul(clipped, c(1.44269504f)));
  const auto r = V::fma(n, c(2.12194440e-4f), V::fma(n, c(-0.693359375f), clipped));
  auto p = V::fma(c(1.9875691500e-4f), r, c(1.3981999507e-3f));
  for (float next : {8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) p = V::fma(p, r, c(next));
  return V::mul(V::add(V::fma(V::mul(p, r), r, r), c(1.0f)), V::power(n));
}

template <class V>
TT_INLINE inline typename V::floats hyperbolic_tangent(typename V::floats x) {
  auto c = [](float value) TT_INLINE { return V::set1(value); };
  const auto square = V::mul(x, x), size = V::max(V::sub(V::zero(), x), x);
  auto p = c(-5.70498872745e-3f);
  for (float next : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f}) {
    p = V::fma(p, square, c(next));
  }
  const auto near = V::fma(V::mul(p, square), x, x);
  const auto shrunk = exponential<V>(V::mul(size, c(-2.0f)));
  const auto far = V::div(V::sub(c(1.0f), shrunk), V::add(c(1.0f), shrunk));
  const auto with_sign = V::choose_less(x, V::zero(), V::sub(V::zero(), far), far);
  return V::choose_less(size, c(0.625f), near, with_sign);
}

// Scores are readable and writable up to a whole vector; what follows the last is ignored and destroyed.
template <class V>
float softmax_weights(const KvSoftmax& s, float* scores, float* maximum) {
  constexpr float kHidden = -std::numeric_limits<float>::infinity();
  const int64_t n = s.tokens, padded = (n + V::W - 1) / V::W * V::W;
  if (s.softcap != 0) {
    const auto inner = V::set1(s.scale / s.softcap), cap = V::set1(s.softcap);
    for (int64_t i = 0; i < padded; i += V::W) {
      V::store(scores + i, V::mul(hyperbolic_tangent<V>(V::mul(V::load(scores + i), inner)), cap));
    }
  } else {
    const auto scale = V::set1(s.scale);
    for (int64_t i = 0; i < padded; i += V::W) V::store(scores + i, V::mul(V::load(scores + i), scale));
  }
  if (s.bias) {
    for (int64_t i = 0; i < n; ++i) scores[i] += s.bias[i];
  }
  std::fill(scores, scores + std::min(n, s.begin), kHidden);
  if (s.tail) {
    for (int64_t i = std::max<int64_t>(0, s.tail_begin); i < n; ++i) {
      if (!s.tail[i - s.tail_begin]) scores[i] = kHidden;
    }
  }
  std::fill(scores + n, scores + padded, kHidden);
  auto most = V::set1(kHidden);
  for (int64_t i = 0; i < padded; i += V::W) most = V::max(V::load(scores + i), most);
  float each[V::W];
  V::store(each, most);
  const float top = *std::max_element(each, each + V::W);
  *maximum = top;
  if (top == kHidden) {  // all are hidden, or NaN
    const bool hidden = std::all_of(scores, scores + n, [](float score) { return score == kHidden; });
    const float weight = hidden ? 0.0f : std::numeric_limits<float>::quiet_NaN();
    if (!hidden) *maximum = 0;
    std::fill(scores, scores + n, weight);
    return weight;
  }
  const auto shift = V::set1(top);
  auto sum = V::zero();
  for (int64_t i = 0; i < padded; i += V::W) {
    const auto weight = exponential<V>(V::sub(V::load(scores + i), shift));
    V::store(scores + i, weight);
    sum = V::add(sum, weight);
  }
  return V::sum(sum);
}

}  // namespace
}  // namespace trimtab
