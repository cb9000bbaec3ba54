// fp16 conversions of CUDA's header of the same name, in integers.
#pragma once

#include "cuda_runtime.h"

struct __half {
  uint16_t bits;
};
inline __half __ushort_as_half(uint16_t bits) { return {bits}; }
inline uint16_t __half_as_ushort(__half value) { return value.bits; }

inline float __half2float(__half value) {
  const int exponent = value.bits >> 10 & 31, mantissa = value.bits & 1023;
  const float sign = value.bits & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 31) return mantissa ? std::nanf("") : sign * INFINITY;
  if (exponent == 0) return sign * std::ldexp(static_cast<float>(mantissa), -24);
  return sign * std::ldexp(static_cast<float>(mantissa + 1024), exponent - 25);
}

// To nearest, ties to even.
inline __half __float2half_rn(float value) {
  const uint16_t sign = std::signbit(value) ? 0x8000 : 0;
  const float size = std::fabs(value);
  if (std::isnan(value)) return {0x7fff};
  if (size >= 65520.0f) return {static_cast<uint16_t>(sign | 0x7c00)};
  int exponent = size == 0.0f ? -13 : std::ilogb(size) + 1;  // size < 2^exponent
  if (exponent < -13) exponent = -13;                        // below 2^-14 the spacing stays 2^-24
  const int steps = static_cast<int>(std::nearbyint(std::ldexp(size, 11 - exponent)));  // of 2^(exponent - 11)
  return {static_cast<uint16_t>(sign | (((exponent + 13) << 10) + steps))};
}
