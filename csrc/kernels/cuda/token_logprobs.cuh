// Log-probability of one token and entropy of its distribution, and their gradient, without a row of probabilities.
//
// Powers of two throughout: exp(x / T) = 2^(c x) with c = log2(e) / T, one instruction where expf takes a dozen. Each
// row begins where it happens to: what lies before its first multiple of 16 bytes and behind its last is read one by
// one.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

constexpr int kLogitsThreads = 256;
constexpr float kLeast = -126.0f;            // powers below vanish: they would be subnormal
constexpr float kLowest = -3.402823466e38f;  // of all floats
constexpr double kLog2E = 1.4426950408889634, kLn2 = 0.6931471805599453;

#ifdef CARERL_EMULATED
using emulator::exp2_flushed;
using emulator::max_or_nan;
#else
CARERL_DEVICE float exp2_flushed(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}
CARERL_DEVICE float max_or_nan(float a, float b) {
  float larger;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(larger) : "f"(a), "f"(b));
  return larger;
}
#endif

// Sums over part of a row, y = c (x - largest): of 2^y and of 2^y y.
struct RowSums {
  float largest;
  double sum, moment;
};

CARERL_DEVICE RowSums joined(const RowSums& a, const RowSums& b, double c) {
  const double difference = c * (static_cast<double>(a.largest) - b.largest);
  const bool first = difference > 0.0;
  const double shift = first ? -difference : difference, factor = exp2(shift);  // of the lower maximum to the higher
  const double sum = first ? b.sum : a.sum, moment = first ? b.moment : a.moment;
  return {first ? a.largest : b.largest, (first ? a.sum : b.sum) + sum * factor,
          (first ? a.moment : b.moment) + (moment + shift * sum) * factor};
}

CARERL_DEVICE double shuffled(double x, int offset) { return __shfl_xor_sync(kAllLanes, x, offset); }

// Of the whole row, the same in every thread; `shared` has room for one RowSums per warp.
CARERL_DEVICE RowSums joined_over_block(RowSums own, double c, RowSums* shared) {
#pragma unroll 1  // exp2 in fp64 is long
  for (int offset = 16; offset > 0; offset /= 2) {
    const RowSums other = {__shfl_xor_sync(kAllLanes, own.largest, offset), shuffled(own.sum, offset),
                           shuffled(own.moment, offset)};
    own = joined(own, other, c);
  }
  if (threadIdx.x % 32 == 0) shared[threadIdx.x / 32] = own;
  __syncthreads();
  own = shared[0];
#pragma unroll 1
  for (int warp = 1; warp < kLogitsThreads / 32; ++warp) own = joined(own, shared[warp], c);
  return own;
}

// A row as single elements up to the first multiple of 16 bytes, vectors, and single elements again.
template <class E>
struct Cut {
  int64_t head, vectors, singles;

  __device__ __forceinline__ Cut(const typename E::Type* row, int64_t n) {
    head = min64((16 - (reinterpret_cast<uintptr_t>(row) & 15)) % 16 / sizeof(typename E::Type), n);
    vectors = (n - head) / E::kWidth;
    singles = n - vectors * E::kWidth;
  }
  __device__ __forceinline__ int64_t single(int64_t i) const { return i < head ? i : i + vectors * E::kWidth; }
};

// A running maximum, and sums in fp32 over a thread's share of the row (600 of 150 000 logits), which move to a new
// maximum where one is found.
struct Running {
  float c, largest = kLowest, sum = 0.0f, moment = 0.0f;

  template <int kCount>
  __device__ __forceinline__ void add(const float (&x)[kCount]) {
    float highest = x[0];
#pragma unroll
    for (int i = 1; i < kCount; ++i) highest = fmaxf(highest, x[i]);
    if (highest > largest) {
      const float shift = fmaxf((largest - highest) * c, kLeast), factor = exp2_flushed(shift);
      moment = (moment + shift * sum) * factor;
      sum *= factor;
      largest = highest;
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const float y = (x[i] - largest) * c, power = exp2_flushed(y);
      sum += power;
      moment += power * max_or_nan(y, kLeast);  // 0 * -inf has no place; a NaN has
    }
  }
};

template <class E>
CARERL_DEVICE void unpack(const uint4& raw, float* x) {
#pragma unroll
  for (int q = 0; q < E::kWidth / 4; ++q) {
    float four[4];
    E::quad(raw, q, four);
#pragma unroll
    for (int i = 0; i < 4; ++i) x[4 * q + i] = four[i];
  }
}

template <class E>
CARERL_DEVICE float element(const typename E::Type* p) {
  float four[4];
  E::quad(make_uint4(E::bits(*p), 0, 0, 0), 0, four);
  return four[0];
}

CARERL_DEVICE double scale_of(const Logits& logits) { return kLog2E * static_cast<double>(logits.inverse_temperature); }

// Reads the row once, two vectors in flight.
template <class E>
CARERL_DEVICE RowSums row_sums(const typename E::Type* row, const Logits& logits) {
  constexpr int W = E::kWidth;
  const Cut<E> cut(row, logits.vocabulary);
  Running running = {static_cast<float>(scale_of(logits))};
  for (int64_t i = threadIdx.x; i < cut.singles; i += kLogitsThreads) {
    const float one[1] = {element<E>(row + cut.single(i))};
    running.add(one);
  }
  row += cut.head;
  int64_t i = threadIdx.x;
  for (; i + kLogitsThreads < cut.vectors; i += 2 * kLogitsThreads) {
    const uint4 raw[2] = {load_aligned<E>(row + i * W), load_aligned<E>(row + (i + kLogitsThreads) * W)};
    float x[2 * W];
    unpack<E>(raw[0], x);
    unpack<E>(raw[1], x + W);
    running.add(x);
  }
  if (i < cut.vectors) {
    float x[W];
    unpack<E>(load_aligned<E>(row + i * W), x);
    running.add(x);
  }
  return {running.largest, running.sum, running.moment};
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
    const RowSums sums =
        joined_over_block(row_sums<E>(data, logits), scale_of(logits), reinterpret_cast<RowSums*>(shared));
    if (threadIdx.x != 0) return;
    const bool exists = id >= 0 && id < logits.vocabulary;
    const double x = exists ? element<E>(data + id) : __uint_as_float(0x7fc00000u), log_sum = log(sums.sum);
    out.logp[row] = static_cast<float>((x - sums.largest) * logits.inverse_temperature - log_sum);
    out.entropy[row] = static_cast<float>(log_sum - kLn2 * sums.moment / sums.sum);
  });
}

// d logits = (1/T) * (grad_logp * (onehot - p) - grad_entropy * p * (log p + entropy)), one pass over the row. With
// y = log2 p = c (x - base) + offset the middle of it is p (y slope + level). Base and offset are the token's own,
// whose log-probability the forward pass gave; fp32 has too few digits of one below -16 (a masked token has none at
// all), and the row is summed once more.
static __global__ void __launch_bounds__(kLogitsThreads)
    logprobs_backward_kernel(const __grid_constant__ Logits logits, LogProbs forward, LogProbsGradient gradient) {
  CARERL_SHARED(shared);
  const int64_t row = blockIdx.x, id = logits.ids[row];
  with_gradient_type(logits.dtype, [&](auto type) {
    using E = decltype(type);
    constexpr int W = E::kWidth;
    const typename E::Type* data = static_cast<const typename E::Type*>(logits.data) + row * logits.stride;
    typename E::Type* out = static_cast<typename E::Type*>(gradient.logits) + row * logits.vocabulary;
    const float logp = forward.logp[row];
    float base, offset;
    if (logp >= -16.0f && id >= 0 && id < logits.vocabulary) {
      base = element<E>(data + id);
      offset = logp * static_cast<float>(kLog2E);
    } else {
      const RowSums sums =
          joined_over_block(row_sums<E>(data, logits), scale_of(logits), reinterpret_cast<RowSums*>(shared));
      base = sums.largest;
      offset = static_cast<float>(-kLog2E * log(sums.sum));
    }
    const float c = static_cast<float>(scale_of(logits));
    const float along = gradient.logp[row] * logits.inverse_temperature;
    const float spread = gradient.entropy[row] * logits.inverse_temperature;
    const float slope = -spread * static_cast<float>(kLn2), level = -(along + spread * forward.entropy[row]);
    const auto value = [&](float x, bool token) {
      const float y = (x - base) * c + offset;
      const float moved = exp2_flushed(y) * (max_or_nan(y, kLeast) * slope + level);
      return E::narrow(token ? along + moved : moved);
    };
    Cut<E> cut(data, logits.vocabulary);
    if (((reinterpret_cast<uintptr_t>(data) ^ reinterpret_cast<uintptr_t>(out)) & 15) != 0) {
      cut.head = cut.vectors = 0;  // no vector of one lies on a vector of the other
      cut.singles = logits.vocabulary;
    }
    for (int64_t i = threadIdx.x; i < cut.singles; i += kLogitsThreads) {
      const int64_t at = cut.single(i);
      const uint32_t bits = value(element<E>(data + at), at == id);
      if constexpr (W == 4)
        out[at] = __uint_as_float(bits);
      else
        out[at] = static_cast<typename E::Type>(bits);
    }
    const auto store = [&](int64_t i, const uint4& raw) {
      const int64_t at = cut.head + i * W;
      const int token = id - at >= 0 && id - at < W ? static_cast<int>(id - at) : -1;
      float x[W];
      unpack<E>(raw, x);
      store_values<E, W>(out + at, W, true, [&](int e) { return value(x[e], e == token); });
    };
    int64_t i = threadIdx.x;
    for (; i + kLogitsThreads < cut.vectors; i += 2 * kLogitsThreads) {
      const uint4 raw[2] = {load_aligned<E>(data + cut.head + i * W),
                            load_aligned<E>(data + cut.head + (i + kLogitsThreads) * W)};
      store(i, raw[0]);
      store(i + kLogitsThreads, raw[1]);
    }
    if (i < cut.vectors) store(i, load_aligned<E>(data + cut.head + i * W));
  });
}

}  // namespace carerl::cuda
