// Pass 1 where bases and gradients are both bf16 and the processor multiplies pairs of them (AVX512-BF16): half of the
// loads and no conversions, so that memory is the limit on machines with much of it. The instruction adds two exact
// products to an fp32 sum, each rounded once, and takes subnormal numbers for zero.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int64_t kPairs = 2 * kWidth;  // bf16 numbers in a vector
constexpr int64_t kReach = 1024;        // elements from what is read to what is asked for

CARERL_INLINE __m512bh load_pairs(const uint16_t* p) { return (__m512bh)_mm512_loadu_si512(p); }
// n < kPairs of them, zeros behind
CARERL_INLINE __m512bh load_pairs(const uint16_t* p, int64_t n) {
  return (__m512bh)_mm512_maskz_loadu_epi16((1u << n) - 1, p);
}

// lanes[r][c] += u[r] . g[c] over n columns: fp32 for at most kFold of them, then fp64.
template <int R, int C>
static void dot_pairs(const uint16_t* const (&u)[R], const uint16_t* const (&g)[C], int64_t n,
                      double (&lanes)[R][C][kWidth]) {
  constexpr int kChains = C == 1 ? 2 : 1;  // eight independent sums hide the latency of the multiply-add
  static_assert(kFold % (kChains * kPairs) == 0);
  for (int64_t begin = 0; begin < n; begin += kFold) {
    __m512 sums[kChains][R][C];
    CARERL_UNROLL
    for (int k = 0; k < kChains; ++k) {
      CARERL_UNROLL
      for (int r = 0; r < R; ++r) {
        CARERL_UNROLL
        for (int c = 0; c < C; ++c) sums[k][r][c] = _mm512_setzero_ps();
      }
    }
    int64_t i = begin;
    const int64_t end = min64(n, begin + kFold);
    for (; i + kChains * kPairs <= end; i += kChains * kPairs) {
      CARERL_UNROLL
      for (int k = 0; k < kChains; ++k) {
        const int64_t at = i + k * kPairs;
        __m512bh gradient[C];
        CARERL_UNROLL
        for (int c = 0; c < C; ++c) gradient[c] = load_pairs(g[c] + at);
        CARERL_UNROLL
        for (int r = 0; r < R; ++r) {
          __builtin_prefetch(u[r] + at + kReach, 0, 2);
          const __m512bh direction = load_pairs(u[r] + at);
          CARERL_UNROLL
          for (int c = 0; c < C; ++c) sums[k][r][c] = _mm512_dpbf16_ps(sums[k][r][c], direction, gradient[c]);
        }
      }
    }
    for (; i < end; i += kPairs) {
      const int64_t there = min64(end - i, kPairs);
      const auto some = [&](const uint16_t* p) { return there == kPairs ? load_pairs(p) : load_pairs(p, there); };
      CARERL_UNROLL
      for (int r = 0; r < R; ++r) {
        CARERL_UNROLL
        for (int c = 0; c < C; ++c) sums[0][r][c] = _mm512_dpbf16_ps(sums[0][r][c], some(u[r] + i), some(g[c] + i));
      }
    }
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      CARERL_UNROLL
      for (int c = 0; c < C; ++c) {
        fold(lanes[r][c], (Float)(kChains == 2 ? sums[0][r][c] + sums[kChains - 1][r][c] : sums[0][r][c]));
      }
    }
  }
}

template <int R, int C>
static void project_rows(const Basis& basis, const Span& span, int64_t row, int64_t first, int64_t begin, int64_t n,
                         double* totals) {
  double lanes[R][C][kWidth] = {};
  const uint16_t *u[R], *g[C];
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) u[r] = element<BF16>(basis, row + r, span.column + begin);
  CARERL_UNROLL
  for (int c = 0; c < C; ++c) g[c] = static_cast<const uint16_t*>(gradient(span, first + c, begin));
  dot_pairs<R, C>(u, g, n, lanes);
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int c = 0; c < C; ++c) totals[(first + c) * basis.rows + row + r] += sum(lanes[r][c], kWidth);
  }
}

// f(Constant<C>{}, first) for the gradients of a span, at most three together
template <class F>
CARERL_INLINE void for_gradients(int64_t batch, const F& f) {
  int64_t b = 0;
  for (; b + 3 <= batch; b += 3) f(Constant<3>{}, b);
  if (batch - b == 2) f(Constant<2>{}, b);
  if (batch - b == 1) f(Constant<1>{}, b);
}

// totals [batch, K] += G U^T, both bf16
static void project_pairs(const Basis& basis, const Span& span, double* totals) {
  const int64_t tile = tile_length(basis, min64(span.batch, kMaxBatch));
  for (int64_t begin = 0; begin < span.length; begin += tile) {
    const int64_t n = min64(tile, span.length - begin);
    auto rows = [&](auto r, int64_t row) {
      for_gradients(span.batch, [&](auto c, int64_t first) {
        project_rows<r.value, c.value>(basis, span, row, first, begin, n, totals);
      });
    };
    int64_t row = 0;
    for (; row + kRows <= basis.rows; row += kRows) rows(Constant<kRows>{}, row);
    for (; row < basis.rows; ++row) rows(Constant<1>{}, row);
  }
}

}  // namespace carerl::cpu::CARERL_ISA
