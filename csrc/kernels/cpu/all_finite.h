// Whether numbers are finite: those with all exponent bits set are not.
#pragma once

#include "simd.h"

namespace carerl::cpu::CARERL_ISA {

template <class Lane>
static bool finite_lanes(const void* data, int64_t n, Lane exponent) {
  typedef Lane Lanes __attribute__((vector_size(CARERL_VECTOR_BYTES)));
  typedef Lanes Loose __attribute__((aligned(1), may_alias));
  constexpr int64_t kLanes = CARERL_VECTOR_BYTES / sizeof(Lane);
  constexpr int kChains = 4;
  const Lane* p = static_cast<const Lane*>(data);
  const Lanes mask = Lanes{} + exponent;
  Lanes found[kChains] = {};
  // Four places side by side: memory gives a single stream up to a third less.
  const int64_t part = n / (kChains * kLanes) * kLanes;
  for (int64_t i = 0; i < part; i += kLanes) {
    CARERL_UNROLL
    for (int c = 0; c < kChains; ++c) {
      const Lanes bits = *reinterpret_cast<const Loose*>(p + c * part + i);
      found[c] |= (Lanes)((bits & mask) == mask);
    }
  }
  Lanes any = (found[0] | found[1]) | (found[2] | found[3]);
  for (int64_t i = kChains * part; i < n; i += kLanes) {
    Lanes bits = {};
    __builtin_memcpy(&bits, p + i, min64(kLanes, n - i) * sizeof(Lane));
    any |= (Lanes)((bits & mask) == mask);
  }
  Lane sum = 0;
  for (int64_t lane = 0; lane < kLanes; ++lane) sum |= any[lane];
  return sum == 0;
}

// n numbers of `bytes` each.
static bool finite(const void* data, int64_t n, int64_t bytes, uint64_t exponent) {
  switch (bytes) {
    case 2:
      return finite_lanes<uint16_t>(data, n, static_cast<uint16_t>(exponent));
    case 4:
      return finite_lanes<uint32_t>(data, n, static_cast<uint32_t>(exponent));
    default:
      return finite_lanes<uint64_t>(data, n, exponent);
  }
}

}  // namespace carerl::cpu::CARERL_ISA
