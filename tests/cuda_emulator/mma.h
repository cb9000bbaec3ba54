// Tensor cores: what a warp multiplies, gathered from its lanes. Sums in fp32 are exact and then truncated, the
// coarsest that hardware does. Meant to be included by the kernels under test.
#pragma once

#include "cuda_fp16.h"
#include "cuda_runtime.h"

namespace emulator {

inline float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

template <bool kFp16>
double half(unsigned bits) {
  return kFp16 ? __half2float(__ushort_as_half(static_cast<uint16_t>(bits))) : from_word<float>(bits << 16);
}

// Four registers of a, two of b: a row of 16 numbers, two to a register.
template <bool kFp16>
void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Words* all = exchange(~0u, __LINE__, to_words(own));
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int lower = i / 2, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 16; ++k) {
      const int place = k % 8 / 2, shift = k % 2 * 16;
      sum += half<kFp16>(from_words<Operands>(all[4 * g + place]).a[lower + k / 8 * 2] >> shift & 0xffffu) *
             half<kFp16>(from_words<Operands>(all[4 * column + place]).b[k / 8] >> shift & 0xffffu);
    }
    c[i] = truncated(sum);
  }
}

inline double tf32(unsigned bits) { return from_word<float>(bits & 0xffffe000u); }

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  const Words* all = exchange(~0u, __LINE__, to_words(own));
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 4; ++i) {
    const int half = i / 2, column = 2 * t + i % 2;
    double sum = c[i];
    for (int k = 0; k < 8; ++k) {
      sum += tf32(from_words<Operands>(all[4 * g + k % 4]).a[half + k / 4 * 2]) *
             tf32(from_words<Operands>(all[4 * column + k % 4]).b[k / 4]);
    }
    c[i] = truncated(sum);
  }
}

inline void mma_double(double (&c)[2], double a, double b) {
  struct Operands {
    double a, b;
  };
  const Words* all = exchange(~0u, __LINE__, to_words(Operands{a, b}));
  const int g = lane() / 4, t = lane() % 4;
  for (int i = 0; i < 2; ++i) {
    for (int k = 0; k < 4; ++k) {
      c[i] = std::fma(from_words<Operands>(all[4 * g + k]).a, from_words<Operands>(all[4 * (2 * t + i) + k]).b, c[i]);
    }
  }
}

}  // namespace emulator
