// Gram matrix of [U; G] in fp64: products of fp32 numbers are exact there. fp32 lanes would be half the work, but
// streaming PCA divides by eigenvalues down to 1e-6 of this matrix, and their rounding (1e-7 of |row|^2) is not small
// against that.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kDoubles = kWidth / 2;
constexpr int kGramRows = 4, kGramColumns = 3;  // 12 sums, 3 rows and 1 broadcast operand: the 16 registers of AVX2
constexpr int64_t kGramBytes = 96 << 10;        // of packed rows, inside L2

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

static void gram(const Basis& basis, const Span& span, double* totals) {
  const int64_t size = basis.rows + span.batch;
  const int64_t padded = size + kGramRows + kGramColumns;  // zero rows, so that blocks may overhang
  const int64_t fitting = kGramBytes / static_cast<int64_t>(sizeof(double)) / padded / kWidth * kWidth;
  const int64_t tile = fitting < 4 * kWidth ? 4 * kWidth : min64(fitting, kFold);
  double* packed = static_cast<double*>(scratch(padded * tile * sizeof(double) + kTile * sizeof(float)));
  float* floats = reinterpret_cast<float*>(packed + padded * tile);
  for (int64_t i = size * tile; i < padded * tile; ++i) packed[i] = 0;
  for (int64_t begin = 0; begin < span.length; begin += tile) {
    const int64_t n = min64(tile, span.length - begin);
    for (int64_t row = 0; row < size; ++row) {
      if (row < basis.rows) {
        load_basis(basis, row, span.column + begin, floats, n);
      } else {
        load_tile(at(span.grads, span.dtype, (row - basis.rows) * span.stride + begin), span.dtype, floats, n);
      }
      for (int64_t i = 0; i < n; i += kWidth) widen(packed + row * tile + i, load(floats + i));
    }
    const int64_t columns = round_up(n, kWidth);
    for (int64_t r = 0; r < size; r += kGramRows) {
      for (int64_t c = r / kGramColumns * kGramColumns; c < size; c += kGramColumns) {
        double sums[kGramRows][kGramColumns];
        gram_block(packed + r * tile, packed + c * tile, tile, columns, sums);
        for (int64_t i = r; i < min64(r + kGramRows, size); ++i) {
          for (int64_t j = c < i ? i : c; j < min64(c + kGramColumns, size); ++j) {
            totals[i * size + j] += sums[i - r][j - c];
          }
        }
      }
    }
  }
}

}  // namespace carerl::cpu::CARERL_ISA
