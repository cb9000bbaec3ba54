// y = R x in fp64 for symmetric matrices whose upper triangle is stored in fp32, row after row: a quarter of the bytes
// of a square of doubles, each read once for all vectors.
#pragma once

#include "simd.h"

namespace carerl::cpu::CARERL_ISA {

CARERL_INLINE Double load(const double* p) { return *reinterpret_cast<const LooseDouble*>(p); }
CARERL_INLINE void store(double* p, Double x) { *reinterpret_cast<LooseDouble*>(p) = x; }

// Rows [row, row + R) of the triangle from column row + R on: y += R x below and right of the diagonal block.
template <int R, int B>
static void packed_rows(const float* const (&at)[R], int64_t row, int64_t size, const double* x, double* y) {
  const float* entries[R];  // stores could change what a reference names
  Double factor[R][B], sums[R][B] = {};
  double rest[R][B] = {};
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    entries[r] = at[r];
    CARERL_UNROLL
    for (int b = 0; b < B; ++b) factor[r][b] = x[b * size + row + r] - Double{};
  }
  int64_t j = row + R;
  for (; j + kDoubles <= size; j += kDoubles) {
    Double entry[R];
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) entry[r] = widen(entries[r] + j);
    CARERL_UNROLL
    for (int b = 0; b < B; ++b) {
      const Double value = load(x + b * size + j);
      Double out = load(y + b * size + j);
      CARERL_UNROLL
      for (int r = 0; r < R; ++r) {
        out += entry[r] * factor[r][b];
        sums[r][b] += entry[r] * value;
      }
      store(y + b * size + j, out);
    }
  }
  for (; j < size; ++j) {
    for (int r = 0; r < R; ++r) {
      const double entry = entries[r][j];
      for (int b = 0; b < B; ++b) {
        y[b * size + j] += entry * x[b * size + row + r];
        rest[r][b] += entry * x[b * size + j];
      }
    }
  }
  for (int r = 0; r < R; ++r) {
    for (int b = 0; b < B; ++b) {
      for (int lane = 0; lane < kDoubles; ++lane) rest[r][b] += sums[r][b][lane];
      y[b * size + row + r] += rest[r][b];
    }
  }
}

template <int B>
static void packed_times_vectors(const float* packed, int64_t size, const double* x, double* y) {
  for (int64_t i = 0; i < B * size; ++i) y[i] = 0.0;
  int64_t row = 0;
  for (; row + 2 <= size; row += 2) {
    const float* const at[2] = {packed - row, packed + (size - row) - (row + 1)};  // indexed by the column
    for (int b = 0; b < B; ++b) {
      const double *u = x + b * size + row, first = at[0][row], both = at[0][row + 1], second = at[1][row + 1];
      y[b * size + row] += first * u[0] + both * u[1];
      y[b * size + row + 1] += both * u[0] + second * u[1];
    }
    packed_rows<2, B>(at, row, size, x, y);
    packed += 2 * (size - row) - 1;
  }
  if (row < size) {
    for (int b = 0; b < B; ++b) y[b * size + row] += static_cast<double>(*packed) * x[b * size + row];
  }
}

// x and y [vectors, size]
static void packed_times(const float* packed, int64_t size, int64_t vectors, const double* x, double* y) {
  for (; vectors >= 2; vectors -= 2, x += 2 * size, y += 2 * size) packed_times_vectors<2>(packed, size, x, y);
  if (vectors == 1) packed_times_vectors<1>(packed, size, x, y);
}

}  // namespace carerl::cpu::CARERL_ISA
