// Transposes of small matrices of floats.
#pragma once

#include "simd.h"

namespace carerl::cpu::CARERL_ISA {

#if defined(CARERL_AVX2) || defined(CARERL_AVX512)
// dst[k * to + j] = src[j * from + k] of 8 x 8
CARERL_INLINE void transpose8(const float* src, int64_t from, float* dst, int64_t to) {
  __m256 a[8], b[8];
  CARERL_UNROLL
  for (int i = 0; i < 8; ++i) a[i] = _mm256_loadu_ps(src + i * from);
  CARERL_UNROLL
  for (int i = 0; i < 8; i += 2) {
    b[i] = _mm256_unpacklo_ps(a[i], a[i + 1]);
    b[i + 1] = _mm256_unpackhi_ps(a[i], a[i + 1]);
  }
  CARERL_UNROLL
  for (int i = 0; i < 8; i += 4) {
    a[i] = _mm256_shuffle_ps(b[i], b[i + 2], 0x44);
    a[i + 1] = _mm256_shuffle_ps(b[i], b[i + 2], 0xee);
    a[i + 2] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0x44);
    a[i + 3] = _mm256_shuffle_ps(b[i + 1], b[i + 3], 0xee);
  }
  CARERL_UNROLL
  for (int i = 0; i < 4; ++i) {
    _mm256_storeu_ps(dst + i * to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x20));
    _mm256_storeu_ps(dst + (i + 4) * to, _mm256_permute2f128_ps(a[i], a[i + 4], 0x31));
  }
}

// dst[k * to + j] = src[j * from + k], j < rows, k < columns, both multiples of 8
[[maybe_unused]] static void transpose_eights(const float* src, int64_t from, int64_t rows, int64_t columns, float* dst,
                                              int64_t to) {
  for (int64_t j = 0; j < rows; j += 8) {
    for (int64_t k = 0; k < columns; k += 8) transpose8(src + j * from + k, from, dst + k * to + j, to);
  }
}
#endif

// The same of any size.
[[maybe_unused]] static void transpose(const float* src, int64_t from, int64_t rows, int64_t columns, float* dst,
                                       int64_t to) {
  int64_t j = 0;
#if defined(CARERL_AVX2) || defined(CARERL_AVX512)
  for (; j + 8 <= rows; j += 8) {
    int64_t k = 0;
    for (; k + 8 <= columns; k += 8) transpose8(src + j * from + k, from, dst + k * to + j, to);
    for (; k < columns; ++k) {
      for (int64_t i = j; i < j + 8; ++i) dst[k * to + i] = src[i * from + k];
    }
  }
#endif
  for (; j < rows; ++j) {
    for (int64_t k = 0; k < columns; ++k) dst[k * to + j] = src[j * from + k];
  }
}

}  // namespace carerl::cpu::CARERL_ISA
