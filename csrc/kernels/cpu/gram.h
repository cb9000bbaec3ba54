// Gram matrix of [U; G] in fp64: products of fp32 numbers are exact there. fp32 lanes would be half the work, but
// streaming PCA divides by eigenvalues down to 1e-6 of this matrix, and their rounding (1e-7 of |row|^2) is not small
// against that.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kDoubles = kWidth / 2;
constexpr int kGramRows = 4, kGramColumns = 3;  // 12 sums, 3 rows and 1 broadcast operand: the 16 registers of AVX2
constexpr int64_t kGramBytes = 96 << 10;        // of packed rows

// a: four packed rows, b: three; sums[4][3] over n columns (a multiple of kDoubles)
CARERL_INLINE void gram_block(const double* a, const double* b, int64_t pitch, int64_t n,
                              double sums[kGramRows][kGramColumns]) {
  Double lanes[kGramRows][kGramColumns] = {};
  for (int64_t i = 0; i < n; i += kDoubles) {
    Double right[kGramColumns];
    CARERL_UNROLL
    for (int c = 0; c < kGramColumns; ++c) right[c] = *reinterpret_cast<const LooseDouble*>(b + c * pitch + i);
    CARERL_UNROLL
    for (int r = 0; r < kGramRows; ++r) {
      const Double left = *reinterpret_cast<const LooseDouble*>(a + r * pitch + i);
      CARERL_UNROLL
      for (int c = 0; c < kGramColumns; ++c) lanes[r][c] += left * right[c];
    }
  }
  CARERL_UNROLL
  for (int r = 0; r < kGramRows; ++r) {
    CARERL_UNROLL
    for (int c = 0; c < kGramColumns; ++c) {
      double total = 0;
      for (int lane = 0; lane < kDoubles; ++lane) total += lanes[r][c][lane];
      sums[r][c] = total;
    }
  }
}

// totals += upper triangle of the Gram matrix of packed rows [size (and zero rows behind), pitch] over n columns
static void gram_tile(const double* packed, int64_t size, int64_t pitch, int64_t n, double* totals) {
  for (int64_t r = 0; r < size; r += kGramRows) {
    for (int64_t c = r / kGramColumns * kGramColumns; c < size; c += kGramColumns) {
      double sums[kGramRows][kGramColumns];
      gram_block(packed + r * pitch, packed + c * pitch, pitch, n, sums);
      for (int64_t i = r; i < min64(r + kGramRows, size); ++i) {
        for (int64_t j = c < i ? i : c; j < min64(c + kGramColumns, size); ++j) {
          totals[i * size + j] += sums[i - r][j - c];
        }
      }
    }
  }
}

static void gram(const Basis& basis, const Span& span, double* totals) {
  const int64_t size = basis.rows + span.batch;
  const int64_t padded = size + kGramRows + kGramColumns;  // zero rows, so that blocks may overhang
  // Memory is read in long stretches of floats, which are widened a tile at a time.
  const int64_t stretch = columns_within(kStretchBytes, size * sizeof(float), 2 * kTile);
  const int64_t tile = columns_within(kGramBytes, padded * sizeof(double), min64(kFold, stretch));
  double* packed = static_cast<double*>(scratch(padded * tile * sizeof(double) + size * stretch * sizeof(float)));
  float* floats = reinterpret_cast<float*>(packed + padded * tile);
  for (int64_t i = size * tile; i < padded * tile; ++i) packed[i] = 0;
  for (int64_t begin = 0; begin < span.length; begin += stretch) {
    const int64_t filled = min64(stretch, span.length - begin);
    load_stack(basis, span, begin, floats, stretch, filled);
    for (int64_t at = 0; at < filled; at += tile) {
      const int64_t n = round_up(min64(tile, filled - at), kWidth);
      for (int64_t row = 0; row < size; ++row) {
        for (int64_t i = 0; i < n; i += kWidth) widen(packed + row * tile + i, load(floats + row * stretch + at + i));
      }
      gram_tile(packed, size, tile, n, totals);
    }
  }
}

}  // namespace carerl::cpu::CARERL_ISA
