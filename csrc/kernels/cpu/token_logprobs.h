// Log-probability of one token and entropy of its distribution, and their gradient, without a row of probabilities.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

constexpr float kLeast = -87.0f;  // exp below is smaller than the smallest normal float and counts as zero

// exp(x) for x <= 0 (and somewhat above), relative error 2e-7; exact zero below kLeast, NaN for NaN.
CARERL_INLINE Float exp_nonpositive(Float x) {
  const Float shift = splat(0x1.8p23f);  // adding and subtracting 1.5 * 2^23 rounds to an integer
  const Float power = (x * 1.44269504088896341f + shift) - shift;
  // ln 2 in two parts: the first has few bits, so that power * first is exact
  const Float r = (x - power * 0.693359375f) + power * 2.12194440e-4f;
  Float y = splat(1.9875691500e-4f);  // minimax polynomial of exp on [-ln2/2, ln2/2]
  y = y * r + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * r * r + r + 1.0f;
  const Float scaled = y * as_float((as_word(power + shift) << 23) + 0x3f800000u);
  return as_float(as_word(scaled) & ~(Word)(x < splat(kLeast)));
}

CARERL_INLINE const void* logits_row(const Logits& logits, int64_t row) {
  return at(logits.data, logits.dtype, row * logits.stride);
}

// The logit of the row's token, divided by the temperature.
CARERL_INLINE float token_logit(const Logits& logits, int64_t row) {
  float chosen[kWidth];
  load_gradient<F32>(at(logits_row(logits, row), logits.dtype, logits.ids[row]), logits.dtype, chosen, 1);
  return chosen[0] * logits.inverse_temperature;
}

// log of the sum of exp(z) over a row of z = logits / temperature, as largest + log_sum, and the entropy in nats.
struct RowSums {
  double largest, log_sum, entropy;
};

// Reads the row once; the maximum is a running one per tile, so that a tile is exponentiated while it lies in L1. A
// masked logit (-inf) has probability zero.
static RowSums row_sums(const Logits& logits, int64_t row) {
  float* z = static_cast<float*>(scratch(kTile * sizeof(float)));
  const void* data = logits_row(logits, row);
  const Float lowest = splat(-__builtin_inff());
  double sum_all = 0, moment_all = 0;  // of exp(z - largest) and of exp(z - largest) * (z - largest)
  float largest = lowest[0];
  for (int64_t begin = 0; begin < logits.vocabulary; begin += kTile) {
    const int64_t n = min64(kTile, logits.vocabulary - begin);
    load_gradient<F32>(at(data, logits.dtype, begin), logits.dtype, z, n);
    for (int64_t i = n; i % kWidth != 0; ++i) z[i] = lowest[0];
    Float top = lowest;
    for (int64_t i = 0; i < n; i += kWidth) {
      const Float value = load(z + i) * logits.inverse_temperature;
      store(z + i, value);
      top = value > top ? value : top;
    }
    float highest = largest;
    for (int lane = 0; lane < kWidth; ++lane) highest = top[lane] > highest ? top[lane] : highest;
    if (highest > largest && sum_all > 0) {  // what was summed so far goes over to the new maximum
      const double shift = static_cast<double>(largest) - highest, factor = __builtin_exp(shift);
      moment_all = (moment_all + shift * sum_all) * factor;
      sum_all *= factor;
    }
    largest = highest;
    // While everything is masked there is no maximum to subtract; zero leaves -inf and NaN what they are.
    const float base = largest == lowest[0] ? 0.0f : largest;
    Float sums[2] = {}, moments[2] = {};
    for (int64_t i = 0; i < n; i += 2 * kWidth) {
      CARERL_UNROLL
      for (int chain = 0; chain < 2; ++chain) {
        if (i + chain * kWidth >= n) continue;
        const Float x = load(z + i + chain * kWidth) - base;
        const Float e = exp_nonpositive(x);
        sums[chain] += e;
        moments[chain] += e * (x < splat(kLeast) ? Float{} : x);  // 0 * -inf has no place in the sum
      }
    }
    sums[0] += sums[1];
    moments[0] += moments[1];
    for (int lane = 0; lane < kWidth; ++lane) {
      sum_all += sums[0][lane];
      moment_all += moments[0][lane];
    }
  }
  const double log_sum = __builtin_log(sum_all);
  return {largest, log_sum, log_sum - moment_all / sum_all};
}

// log softmax(logits / temperature)[id] and the entropy.
static void logprobs(const Logits& logits, int64_t row, const LogProbs& out) {
  const RowSums sums = row_sums(logits, row);
  out.logp[row] = static_cast<float>(static_cast<double>(token_logit(logits, row)) - sums.largest - sums.log_sum);
  out.entropy[row] = static_cast<float>(sums.entropy);
}

// d logits = (1/T) * (grad_logp * (onehot - p) - grad_entropy * p * (log p + entropy)), one pass over the row.
static void logprobs_backward(const Logits& logits, int64_t row, const LogProbs& forward,
                              const LogProbsGradient& gradient) {
  const void* data = logits_row(logits, row);
  const int64_t id = logits.ids[row];
  float log_total = token_logit(logits, row) - forward.logp[row];
  if (log_total != log_total) {  // a masked token (-inf - -inf), as on padding; or NaN, which stays NaN
    const RowSums sums = row_sums(logits, row);
    log_total = static_cast<float>(sums.largest + sums.log_sum);
  }
  const float along = gradient.logp[row] * logits.inverse_temperature;
  const float spread = gradient.entropy[row] * logits.inverse_temperature;
  void* out = at(gradient.logits, logits.dtype, row * logits.vocabulary);
  float* z = static_cast<float*>(scratch(kTile * sizeof(float)));  // after row_sums, which asks for its own
  for (int64_t begin = 0; begin < logits.vocabulary; begin += kTile) {
    const int64_t n = min64(kTile, logits.vocabulary - begin);
    load_gradient<F32>(at(data, logits.dtype, begin), logits.dtype, z, n);
    for (int64_t i = 0; i < n; i += kWidth) {
      const Float log_p = load(z + i) * logits.inverse_temperature - log_total;
      const Float p = exp_nonpositive(log_p);
      const Float bounded = log_p < splat(kLeast) ? splat(kLeast) : log_p;  // p is zero there, log p may be -inf
      store(z + i, p * -along - p * (bounded + forward.entropy[row]) * spread);
    }
    if (id >= begin && id < begin + n) z[id - begin] += along;
    store_gradient<F32>(z, at(out, logits.dtype, begin), logits.dtype, n, 1.0f);
  }
}

}  // namespace carerl::cpu::CARERL_ISA
