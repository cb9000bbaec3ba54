// Products of small matrices by a warp, in tensor cores. Lane l has group g = l / 4 and place t = l % 4; of a row of
// eight sums it has columns 2t and 2t + 1.
#pragma once

#include "storage.cuh"

#ifdef CARERL_EMULATED
#include "mma.h"
#endif

namespace carerl::cuda {

#ifdef CARERL_EMULATED
using emulator::mma_double;
using emulator::mma_half;
using emulator::mma_tf32;
#else
// c [8, 8] += a [8, 4] b [4, 8] in fp64. a: row g of column t; b: row t of column g; c: row g.
CARERL_DEVICE void mma_double(double (&c)[2], double a, double b) {
  asm("mma.sync.aligned.m8n8k4.row.col.f64.f64.f64.f64 {%0,%1}, {%2}, {%3}, {%0,%1};"
      : "+d"(c[0]), "+d"(c[1])
      : "d"(a), "d"(b));
}

// c [16, 8] += a [16, 8] b [8, 8] in tf32, which drops the 13 lowest bits of its operands: products are exact, sums
// truncated fp32. a: rows g and g + 8 of column t, then of column t + 4; b: rows t and t + 4 of column g; c: row g,
// then row g + 8.
CARERL_DEVICE void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  asm("mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
}

// c [16, 8] += a [16, 16] b [16, 8] of bf16 or fp16 numbers, two to a word: products are exact, sums truncated fp32. a:
// rows g and g + 8 of columns 2t and 2t + 1, then of 2t + 8 and 2t + 9; b: those rows of column g; c: as above.
template <bool kFp16>
CARERL_DEVICE void mma_half(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  if constexpr (kFp16) {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  } else {
    asm("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
        : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b[0]), "r"(b[1]));
  }
}
#endif

// x as one or two terms of 11 bits: fp32 is their sum to 2^-23, and what has 11 bits itself is the first.
template <int kTerms, int kCount>
CARERL_DEVICE void split(const float (&x)[kCount], uint32_t (&terms)[kTerms][kCount]) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    const uint32_t bits = __float_as_uint(x[i]);
    if constexpr (kTerms == 1) {
      terms[0][i] = bits;
    } else {
      terms[0][i] = (bits + 0x1000u) & 0xffffe000u;
      terms[1][i] = __float_as_uint(x[i] - __uint_as_float(terms[0][i]));
    }
  }
}

// c += a b of split operands, the smallest products first and without that of both second terms.
template <int kLeft, int kRight>
CARERL_DEVICE void multiply(float (&c)[4], const uint32_t (&a)[kLeft][4], const uint32_t (&b)[kRight][2]) {
  if constexpr (kLeft == 2) mma_tf32(c, a[1], b[0]);
  if constexpr (kRight == 2) mma_tf32(c, a[0], b[1]);
  mma_tf32(c, a[0], b[0]);
}

}  // namespace carerl::cuda
