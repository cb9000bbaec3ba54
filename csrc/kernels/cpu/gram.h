// Gram matrix of [U; G] in fp64: products of fp32 numbers are exact there. fp32 lanes would be half the work, but
// streaming PCA divides by eigenvalues down to 1e-6 of this matrix, and their rounding (1e-7 of |row|^2) is not small
// against that.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kGramRows = 3;  // 9 sums hide the latency of the multiply-add, and three rows a side fit the registers
constexpr int64_t kGramTile = 256;  // columns widened at once

// sums[r][c] = a[r] . b[c] over n columns (a multiple of kDoubles); of a block on the diagonal (a = b) only c >= r.
template <bool kDiagonal>
CARERL_INLINE void gram_block(const double* a, const double* b, int64_t pitch, int64_t n,
                              double sums[kGramRows][kGramRows]) {
  Double lanes[kGramRows][kGramRows] = {};
  for (int64_t i = 0; i < n; i += kDoubles) {
    Double right[kGramRows];
    CARERL_UNROLL
    for (int c = 0; c < kGramRows; ++c) right[c] = *reinterpret_cast<const LooseDouble*>(b + c * pitch + i);
    CARERL_UNROLL
    for (int r = 0; r < kGramRows; ++r) {
      const Double left = kDiagonal ? right[r] : *reinterpret_cast<const LooseDouble*>(a + r * pitch + i);
      CARERL_UNROLL
      for (int c = kDiagonal ? r : 0; c < kGramRows; ++c) lanes[r][c] += left * right[c];
    }
  }
  CARERL_UNROLL
  for (int r = 0; r < kGramRows; ++r) {
    CARERL_UNROLL
    for (int c = kDiagonal ? r : 0; c < kGramRows; ++c) {
      double total = 0;
      for (int lane = 0; lane < kDoubles; ++lane) total += lanes[r][c][lane];
      sums[r][c] = total;
    }
  }
}

// totals += upper triangle of the Gram matrix of packed rows [size (and zero rows behind), pitch] over n columns
static void gram_tile(const double* packed, int64_t size, int64_t pitch, int64_t n, double* totals, Ahead& ahead) {
  for (int64_t r = 0; r < size; r += kGramRows) {
    for (int64_t c = r; c < size; c += kGramRows) {
      double sums[kGramRows][kGramRows];
      if (r == c) {
        gram_block<true>(packed + r * pitch, packed + c * pitch, pitch, n, sums);
      } else {
        gram_block<false>(packed + r * pitch, packed + c * pitch, pitch, n, sums);
      }
      for (int64_t i = r; i < min64(r + kGramRows, size); ++i) {
        for (int64_t j = c < i ? i : c; j < min64(c + kGramRows, size); ++j) {
          totals[i * size + j] += sums[i - r][j - c];
        }
      }
    }
    ahead.fetch();
  }
}

template <class E>
static void gram_stored(const Basis& basis, const Span& span, double* totals) {
  const int64_t size = basis.rows + span.batch;
  const int64_t padded = round_up(size, kGramRows);  // zero rows, so that blocks may overhang
  const int64_t tile = columns_within(kTileBytes, padded * sizeof(double), kGramTile);
  const int64_t stretch = stretch_of(basis, span, tile);
  const int64_t parts = stretch / tile * (basis.rows / kRows + padded / kGramRows);
  double* packed = static_cast<double*>(scratch(padded * tile * sizeof(double)));
  for (int64_t i = size * tile; i < padded * tile; ++i) packed[i] = 0;
  for (int64_t first = 0; first < span.length; first += stretch) {
    const int64_t end = min64(first + stretch, span.length);
    Ahead ahead(basis, span, end, min64(stretch, span.length - end), parts);
    for (int64_t begin = first; begin < end; begin += tile) {
      const int64_t n = min64(tile, end - begin);
      load_stack<E>(basis, span, begin, packed, tile, n, ahead);
      gram_tile(packed, size, tile, round_up(n, kGroup<E>), totals, ahead);
    }
  }
}

static void gram(const Basis& basis, const Span& span, double* totals) {
  with_storage(basis.dtype, [&](auto type) { gram_stored<decltype(type)>(basis, span, totals); });
}

}  // namespace carerl::cpu::CARERL_ISA
