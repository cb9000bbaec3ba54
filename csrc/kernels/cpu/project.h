// Pass 1: coefficients G U^T. Reads bases and gradients once.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int64_t kAhead = 1024;  // elements from what is read to what is asked for

template <bool kValue>
struct Flag {
  static constexpr bool value = kValue;
};

// sums[r][c] = u[r] . g[c] over columns [i, end) in fp32 lanes; a group may be cut only at
// the tile's end. kWhole: there are only whole turns of the main loop, and no code behind it that costs it registers.
template <class E, int R, int C, bool kWhole>
CARERL_INLINE void accumulate(const typename E::Type* const (&u)[R], const float* g, int64_t pitch, int64_t i,
                              int64_t end, Float (&sums)[R][C]) {
  constexpr int V = kVectors<E>;
  constexpr int kChains = C == 1 ? 2 : 1;     // at least eight independent sums hide the latency of the multiply-add
  constexpr int kSteps = C == 1 ? 4 / V : 1;  // groups per turn of the loop; a block of 32 codes is one turn
  constexpr int64_t kTurn = kSteps * kGroup<E>;
  static_assert(kFold % kTurn == 0 && kUsualBlock % kTurn == 0);
  Float chains[kChains][R][C] = {};
  for (; i + kTurn <= end; i += kTurn) {
    // Rows of few bytes end before the hardware has foreseen how they go on: int8 reads faster so.
    if (!__is_same(E, F32) && i * static_cast<int64_t>(sizeof(typename E::Type)) % 64 == 0) {
      CARERL_UNROLL
      for (int r = 0; r < R; ++r) __builtin_prefetch(u[r] + i + kAhead, 0, 2);
    }
    CARERL_UNROLL
    for (int step = 0; step < kSteps; ++step) {
      const int64_t at = i + step * kGroup<E>;
      Float gradient[C][V];
      CARERL_UNROLL
      for (int c = 0; c < C; ++c) {
        CARERL_UNROLL
        for (int v = 0; v < V; ++v) gradient[c][v] = load(g + c * pitch + at + v * kWidth);
      }
      CARERL_UNROLL
      for (int r = 0; r < R; ++r) {
        Float direction[V];
        Group<E>::load(u[r] + at, direction);
        CARERL_UNROLL
        for (int c = 0; c < C; ++c) {
          CARERL_UNROLL
          for (int v = 0; v < V; ++v) chains[(step * V + v) % kChains][r][c] += direction[v] * gradient[c][v];
        }
      }
    }
  }
  for (; !kWhole && i < end; i += kGroup<E>) {
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      Float direction[V];
      load_group<E>(u[r] + i, end - i, direction);
      CARERL_UNROLL
      for (int c = 0; c < C; ++c) {
        CARERL_UNROLL
        for (int v = 0; v < V; ++v) chains[0][r][c] += direction[v] * load(g + c * pitch + i + v * kWidth);
      }
    }
  }
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int c = 0; c < C; ++c)
      sums[r][c] = kChains == 2 ? chains[0][r][c] + chains[kChains - 1][r][c] : chains[0][r][c];
  }
}

template <int R, int C>
CARERL_INLINE void add_lanes(const double (&lanes)[R][C][kWidth], double* totals, int64_t row, int64_t rows) {
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int c = 0; c < C; ++c) totals[c * rows + row + r] += sum(lanes[r][c], kWidth);
  }
}

// R rows of the bases against C gradients over n columns; fp32 lanes for at most kFold elements, then fp64.
template <class E, int R, int C>
static void dot_tile(const Basis& basis, int64_t row, int64_t column, const float* g, int64_t pitch, int64_t n,
                     double* totals, int64_t rows) {
  double lanes[R][C][kWidth] = {};
  const typename E::Type* u[R];
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) u[r] = element<E>(basis, row + r, column);
  for (int64_t i = 0; i < n; i += kFold) {
    auto run = [&](auto whole, int64_t end) {
      Float sums[R][C];
      accumulate<E, R, C, whole.value>(u, g, pitch, i, end, sums);
      CARERL_UNROLL
      for (int r = 0; r < R; ++r) {
        CARERL_UNROLL
        for (int c = 0; c < C; ++c) fold(lanes[r][c], sums[r][c]);
      }
    };
    i + kFold <= n ? run(Flag<true>{}, i + kFold) : run(Flag<false>{}, n);
  }
  add_lanes(lanes, totals, row, rows);
}

// Codes are summed per block and the block's scale is applied once.
template <class E, int R, int C>
static void dot_tile_scaled(const Basis& basis, int64_t row, int64_t column, const float* g, int64_t pitch, int64_t n,
                            double* totals, int64_t rows) {
  double lanes[R][C][kWidth] = {};
  const typename E::Type* u[R];
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) u[r] = element<E>(basis, row + r, column);
  for (int64_t i = 0; i < n;) {
    const int64_t fold_end = min64(i + kFold, n);
    Float scaled[R][C] = {};
    while (i < fold_end) {
      const int64_t block = (column + i) >> basis.block_shift;
      const int64_t end = run_end(basis, column + i, column + fold_end) - column;
      auto run = [&](auto whole) {
        Float sums[R][C];
        accumulate<E, R, C, whole.value>(u, g, pitch, i, whole.value ? i + kUsualBlock : end, sums);
        CARERL_UNROLL
        for (int r = 0; r < R; ++r) {
          const Float scale = splat(scale_row(basis, row + r)[block]);
          CARERL_UNROLL
          for (int c = 0; c < C; ++c) scaled[r][c] += sums[r][c] * scale;
        }
      };
      end - i == kUsualBlock ? run(Flag<true>{}) : run(Flag<false>{});
      i = end;
    }
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      CARERL_UNROLL
      for (int c = 0; c < C; ++c) fold(lanes[r][c], scaled[r][c]);
    }
  }
  add_lanes(lanes, totals, row, rows);
}

template <class E>
struct Dot {
  template <int R, int C>
  CARERL_INLINE void run(const Basis& basis, int64_t row, int64_t column, const float* g, int64_t pitch, int64_t n,
                         double* totals) {
    dot_tile<E, R, C>(basis, row, column, g, pitch, n, totals, basis.rows);
  }
};
template <class E>
struct ScaledDot {
  template <int R, int C>
  CARERL_INLINE void run(const Basis& basis, int64_t row, int64_t column, const float* g, int64_t pitch, int64_t n,
                         double* totals) {
    dot_tile_scaled<E, R, C>(basis, row, column, g, pitch, n, totals, basis.rows);
  }
};
template <>
struct Dot<I8> : ScaledDot<I8> {};
template <>
struct Dot<F8> : ScaledDot<F8> {};

template <class E, int R>
static void dot_rows(const Basis& basis, int64_t row, int64_t column, const float* g, int64_t pitch, int64_t batch,
                     int64_t n, double* totals) {
  int64_t b = 0;
  for (; b + 3 <= batch; b += 3) {
    Dot<E>::template run<R, 3>(basis, row, column, g + b * pitch, pitch, n, totals + b * basis.rows);
  }
  if (batch - b == 2) Dot<E>::template run<R, 2>(basis, row, column, g + b * pitch, pitch, n, totals + b * basis.rows);
  if (batch - b == 1) Dot<E>::template run<R, 1>(basis, row, column, g + b * pitch, pitch, n, totals + b * basis.rows);
}

template <class E>
static void project_tile(const Basis& basis, int64_t column, const float* g, int64_t pitch, int64_t batch, int64_t n,
                         double* totals) {
  int64_t row = 0;
  for (; row + kRows <= basis.rows; row += kRows) dot_rows<E, kRows>(basis, row, column, g, pitch, batch, n, totals);
  switch (basis.rows - row) {
    case 3:
      return dot_rows<E, 3>(basis, row, column, g, pitch, batch, n, totals);
    case 2:
      return dot_rows<E, 2>(basis, row, column, g, pitch, batch, n, totals);
    case 1:
      return dot_rows<E, 1>(basis, row, column, g, pitch, batch, n, totals);
    default:
      return;
  }
}

template <class E>
static void project_stored(const Basis& basis, const Span& span, double* totals) {
  for (int64_t first = 0; first < span.batch; first += kMaxBatch) {
    const int64_t batch = min64(span.batch - first, kMaxBatch);
    const int64_t tile = tile_length(basis, batch);
    float* g = static_cast<float*>(scratch(batch * tile * sizeof(float)));
    for (int64_t begin = 0; begin < span.length; begin += tile) {
      const int64_t n = min64(tile, span.length - begin);
      for (int64_t b = 0; b < batch; ++b) {
        load_gradient<E>(gradient(span, first + b, begin), span.dtype, g + b * tile, n);
      }
      project_tile<E>(basis, span.column + begin, g, tile, batch, n, totals + first * basis.rows);
    }
  }
}

static void project(const Basis& basis, const Span& span, double* totals) {
  with_storage(basis.dtype, [&](auto type) { project_stored<decltype(type)>(basis, span, totals); });
}

}  // namespace carerl::cpu::CARERL_ISA
