// What the outputs of a weight matrix move by, from their coefficients along directions of its inputs.
#pragma once

#include "simd.h"

namespace carerl::cpu::CARERL_ISA {

CARERL_INLINE Float load_some(const float* p, int64_t n) {
  if (n >= kWidth) return load(p);
  float padded[kWidth] = {};
  __builtin_memcpy(padded, p, n * sizeof(float));
  return load(padded);
}

CARERL_INLINE Float gain_at(const InputWeight& weight, int64_t k, int64_t n) {
  return weight.rows == nullptr ? splat(weight.value) : load_some(weight.rows + k, n) - 1.0f;
}

// A sum of squares in fp64.
struct Energy {
  Double low = {}, high = {};
  inline __attribute__((always_inline)) void add(const float* p) {
    const Double a = widen(p), b = widen(p + kDoubles);
    low += a * a;
    high += b * b;
  }
  double total() const {
    const Double both = low + high;
    double out = 0;
    for (int lane = 0; lane < kDoubles; ++lane) out += both[lane];
    return out;
  }
};

// The coefficients of one output, zeros behind, become its x. False where nothing moves, or something is not finite.
static bool correct(const InputRule& rule, int64_t output, int64_t count, float* c, Energy& energy) {
  Word moved = {}, broken = {};
  Energy own;
  for (int64_t k = 0; k < count; k += kWidth) {
    const int64_t n = count - k, at = output * count + k;
    const Float value = load(c + k);
    Float d, x;
    if (rule.anchor != nullptr) {
      d = load_some(rule.anchor + at, n) - value;
      const Float over = rule.upper == nullptr ? d : d - load_some(rule.upper + at, n);
      const Float under = rule.lower == nullptr ? d : d + load_some(rule.lower + at, n);
      x = as_float(as_word(over) & (Word)(over > 0.0f)) + as_float(as_word(under) & (Word)(under < 0.0f));
      broken |= (Word)(over != over) | (Word)(under != under);
    } else {
      d = value;
      const InputWeight& threshold = rule.threshold;
      const Float tau = threshold.rows == nullptr ? splat(threshold.value) : load_some(threshold.rows + k, n);
      const Word aligned = (Word)(d > tau) & as_word(gain_at(rule.aligned, k, n));
      const Word conflict = (Word)(d < -tau) & as_word(gain_at(rule.conflict, k, n));
      x = as_float(aligned | conflict) * d;
    }
    broken |= (Word)(d - d != 0.0f) | (Word)(x - x != 0.0f);
    moved |= (Word)(x != 0.0f);
    store(c + k, x);
    own.add(c + k);
  }
  if (any(broken) || !any(moved)) return false;
  energy.low += own.low;
  energy.high += own.high;
  return true;
}

}  // namespace carerl::cpu::CARERL_ISA
