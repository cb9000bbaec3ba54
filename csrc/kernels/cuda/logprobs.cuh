// Log-probability of one token and entropy of its distribution, and their gradient, without a row of probabilities.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

constexpr int kLogitsThreads = 256;
constexpr float kLeast = -87.0f;  // exp below is smaller than the smallest normal float and counts as zero

// Sums over part of a row of z = logits / temperature: of e = exp(z - largest) and of e * (z - largest).
struct RowSums {
  float largest;
  double sum, moment;
};

CARERL_DEVICE float minus_infinity() { return __uint_as_float(0xff800000u); }

// While everything is masked there is no maximum to subtract; zero leaves -inf and NaN what they are.
CARERL_DEVICE float base_of(float largest) { return largest == minus_infinity() ? 0.0f : largest; }

CARERL_DEVICE RowSums joined(const RowSums& a, const RowSums& b) {
  const bool first = a.largest > b.largest;
  const float high = first ? a.largest : b.largest, low = first ? b.largest : a.largest;
  const double sum = first ? b.sum : a.sum, moment = first ? b.moment : a.moment;  // those of the lower maximum
  if (low == high || sum == 0.0) return {high, a.sum + b.sum, a.moment + b.moment};
  const double shift = static_cast<double>(base_of(low)) - base_of(high), factor = exp(shift);
  return {high, (first ? a.sum : b.sum) + sum * factor,
          (first ? a.moment : b.moment) + (moment + shift * sum) * factor};
}

CARERL_DEVICE double shuffled(double x, int offset) { return __shfl_xor_sync(kAllLanes, x, offset); }

// Of the whole row, the same in every thread; `shared` has room for one RowSums per warp.
CARERL_DEVICE RowSums joined_over_block(RowSums own, RowSums* shared) {
#pragma unroll 1  // exp in fp64 is long
  for (int offset = 16; offset > 0; offset /= 2) {
    const RowSums other = {__shfl_xor_sync(kAllLanes, own.largest, offset), shuffled(own.sum, offset),
                           shuffled(own.moment, offset)};
    own = joined(own, other);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  own = shared[0];
#pragma unroll 1
  for (int warp = 1; warp < kLogitsThreads / 32; ++warp) own = joined(own, shared[warp]);
  return own;
}

// Reads the row once, a vector at a time. Every thread keeps a running maximum and moves its sums, fp32 over its share
// of the row (600 of 150 000 logits), to a new one when it finds it.
template <class E>
CARERL_DEVICE RowSums row_sums(const typename E::Type* row, const Logits& logits) {
  const bool aligned = rows_aligned(row, 0, 1);
  float largest = minus_infinity(), sum = 0.0f, moment = 0.0f;
  for (int64_t x = threadIdx.x * E::kWidth; x < logits.vocabulary; x += kLogitsThreads * E::kWidth) {
    const int64_t n = logits.vocabulary - x;
    float z[E::kWidth];
    load_values<E, E::kWidth>(row + x, n, aligned, z);
    float highest = largest;
#pragma unroll
    for (int i = 0; i < E::kWidth; ++i) {
      z[i] = i < n ? z[i] * logits.inverse_temperature : minus_infinity();
      highest = z[i] > highest ? z[i] : highest;
    }
    if (highest > largest) {
      const float shift = base_of(largest) - highest;
      // Nothing summed, or next to nothing: 0 * inf has no place in the moment.
      const float factor = shift < kLeast || largest == minus_infinity() ? 0.0f : expf(shift);
      if (sum == sum) {
        moment = factor == 0.0f ? 0.0f : (moment + shift * sum) * factor;
        sum = factor == 0.0f ? 0.0f : sum * factor;
      }
      largest = highest;
    }
    const float base = base_of(largest);
#pragma unroll
    for (int i = 0; i < E::kWidth; ++i) {
      const float shifted = z[i] - base;
      const float e = expf(shifted);
      sum += shifted < kLeast ? 0.0f : e;
      moment += shifted < kLeast ? 0.0f : e * shifted;  // 0 * -inf has no place either
    }
  }
  return {largest, sum, moment};
}

// log softmax(logits / temperature)[id] and the entropy in nats, a block per row. An id outside the vocabulary gives
// NaN: finding it earlier would need a synchronisation. Shared memory: a RowSums per warp.
static __global__ void __launch_bounds__(kLogitsThreads)
    logprobs_kernel(const __grid_constant__ Logits logits, LogProbs out) {
  CARERL_SHARED(shared);
  const int64_t row = blockIdx.x, id = logits.ids[row];
  with_gradient_type(logits.dtype, [&](auto type) {
    using E = decltype(type);
    const typename E::Type* data = static_cast<const typename E::Type*>(logits.data) + row * logits.stride;
    const RowSums sums = joined_over_block(row_sums<E>(data, logits), reinterpret_cast<RowSums*>(shared));
    if (threadIdx.x != 0) return;
    float token[4];
    const bool exists = id >= 0 && id < logits.vocabulary;
    E::quad(gather<E>(data + id, exists ? 1 : 0), 0, token);
    const float z = exists ? token[0] * logits.inverse_temperature : __uint_as_float(0x7fc00000u);
    const double log_sum = log(sums.sum);
    out.logp[row] = static_cast<float>(static_cast<double>(z) - base_of(sums.largest) - log_sum);
    out.entropy[row] = static_cast<float>(log_sum - sums.moment / sums.sum);
  });
}

// d logits = (1/T) * (grad_logp * (onehot - p) - grad_entropy * p * (log p + entropy)), one pass over the row.
static __global__ void __launch_bounds__(kLogitsThreads)
    logprobs_backward_kernel(const __grid_constant__ Logits logits, LogProbs forward, LogProbsGradient gradient) {
  CARERL_SHARED(shared);
  const int64_t row = blockIdx.x, id = logits.ids[row];
  with_gradient_type(logits.dtype, [&](auto type) {
    using E = decltype(type);
    constexpr int W = E::kWidth;
    const typename E::Type* data = static_cast<const typename E::Type*>(logits.data) + row * logits.stride;
    typename E::Type* out = static_cast<typename E::Type*>(gradient.logits) + row * logits.vocabulary;
    float token[4];
    const bool exists = id >= 0 && id < logits.vocabulary;
    E::quad(gather<E>(data + id, exists ? 1 : 0), 0, token);
    float log_total = token[0] * logits.inverse_temperature - forward.logp[row];
    if (log_total != log_total) {  // a masked token (-inf - -inf), as on padding; or NaN, which stays NaN
      const RowSums sums = joined_over_block(row_sums<E>(data, logits), reinterpret_cast<RowSums*>(shared));
      log_total = static_cast<float>(base_of(sums.largest) + log(sums.sum));
    }
    const float along = gradient.logp[row] * logits.inverse_temperature;
    const float spread = gradient.entropy[row] * logits.inverse_temperature, entropy = forward.entropy[row];
    const bool aligned = rows_aligned(data, 0, 1), writes_aligned = rows_aligned(out, 0, 1);
    for (int64_t x = threadIdx.x * W; x < logits.vocabulary; x += kLogitsThreads * W) {
      const int64_t n = logits.vocabulary - x;
      float z[W];
      load_values<E, W>(data + x, n, aligned, z);
      store_values<E, W>(out + x, n, writes_aligned, [&](int i) {
        const float log_p = z[i] * logits.inverse_temperature - log_total;
        const float p = log_p < kLeast ? 0.0f : expf(log_p);
        const float bounded = log_p < kLeast ? kLeast : log_p;  // p is zero there, log p may be -inf
        return E::narrow((x + i == id ? along : 0.0f) - p * along - p * (bounded + entropy) * spread);
      });
    }
  });
}

}  // namespace carerl::cuda
