// Pass 2: G <- scale * (G + mix U). Reads the rows that any gradient uses, reads and writes the gradients, rounds once.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

CARERL_INLINE bool is_finite(float x) { return x - x == 0.0f; }

// y[c] += sum_r factor[r][c] u[r] over columns [i, end)
template <class E, int R, int C>
CARERL_INLINE void axpy_run(const typename E::Type* const (&u)[R], const Float (&factor)[R][C], float* y, int64_t pitch,
                            int64_t i, int64_t end) {
  constexpr int V = kVectors<E>;
  auto group = [&](int64_t i, auto load_rows_at) {
    Float value[C][V];
    CARERL_UNROLL
    for (int c = 0; c < C; ++c) {
      CARERL_UNROLL
      for (int v = 0; v < V; ++v) value[c][v] = load(y + c * pitch + i + v * kWidth);
    }
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      Float direction[V];
      load_rows_at(u[r] + i, direction);
      CARERL_UNROLL
      for (int c = 0; c < C; ++c) {
        CARERL_UNROLL
        for (int v = 0; v < V; ++v) value[c][v] += factor[r][c] * direction[v];
      }
    }
    CARERL_UNROLL
    for (int c = 0; c < C; ++c) {
      CARERL_UNROLL
      for (int v = 0; v < V; ++v) store(y + c * pitch + i + v * kWidth, value[c][v]);
    }
  };
  for (; i + kGroup<E> <= end; i += kGroup<E>) {
    group(i, [](const typename E::Type* p, Float* x) { Group<E>::load(p, x); });
  }
  if (i < end) group(i, [&](const typename E::Type* p, Float* x) { load_group<E>(p, end - i, x); });
}

// y[c] += sum_r mix[r][c] u[r] over n columns
template <class E, int R, int C>
static void axpy_tile(const Basis& basis, const int64_t* rows, int64_t column, const float* mix, int64_t mixes,
                      float* y, int64_t pitch, int64_t n) {
  const typename E::Type* u[R];
  Float factor[R][C];
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    u[r] = element<E>(basis, rows[r], column);
    CARERL_UNROLL
    for (int c = 0; c < C; ++c) factor[r][c] = splat(mix[r * mixes + c]);
  }
  axpy_run<E, R, C>(u, factor, y, pitch, 0, n);
}

// One run per block, with the scale folded into the factors.
template <class E, int R, int C>
static void axpy_tile_scaled(const Basis& basis, const int64_t* rows, int64_t column, const float* mix, int64_t mixes,
                             float* y, int64_t pitch, int64_t n) {
  const typename E::Type* u[R];
  const float* scales[R];
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    u[r] = element<E>(basis, rows[r], column);
    scales[r] = scale_row(basis, rows[r]);
  }
  for (int64_t i = 0; i < n;) {
    const int64_t block = (column + i) >> basis.block_shift;
    const int64_t end = run_end(basis, column + i, column + n) - column;
    Float factor[R][C];
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      CARERL_UNROLL
      for (int c = 0; c < C; ++c) factor[r][c] = splat(mix[r * mixes + c] * scales[r][block]);
    }
    if (end - i == kUsualBlock) {
      axpy_run<E, R, C>(u, factor, y, pitch, i, i + kUsualBlock);
    } else {
      axpy_run<E, R, C>(u, factor, y, pitch, i, end);
    }
    i = end;
  }
}

template <class E>
struct Axpy {
  template <int R, int C>
  CARERL_INLINE void run(const Basis& basis, const int64_t* rows, int64_t column, const float* mix, int64_t mixes,
                         float* y, int64_t pitch, int64_t n) {
    axpy_tile<E, R, C>(basis, rows, column, mix, mixes, y, pitch, n);
  }
};
template <class E>
struct ScaledAxpy {
  template <int R, int C>
  CARERL_INLINE void run(const Basis& basis, const int64_t* rows, int64_t column, const float* mix, int64_t mixes,
                         float* y, int64_t pitch, int64_t n) {
    axpy_tile_scaled<E, R, C>(basis, rows, column, mix, mixes, y, pitch, n);
  }
};
template <>
struct Axpy<I8> : ScaledAxpy<I8> {};
template <>
struct Axpy<F8> : ScaledAxpy<F8> {};

template <class E, int R>
static void axpy_rows(const Basis& basis, const int64_t* rows, int64_t column, const float* mix, int64_t batch,
                      float* y, int64_t pitch, int64_t n) {
  int64_t b = 0;
  for (; b + 2 <= batch; b += 2) {
    Axpy<E>::template run<R, 2>(basis, rows, column, mix + b, batch, y + b * pitch, pitch, n);
  }
  if (b < batch) Axpy<E>::template run<R, 1>(basis, rows, column, mix + b, batch, y + b * pitch, pitch, n);
}

template <class E>
static void axpy_all(const Basis& basis, const int64_t* rows, int64_t count, int64_t column, const float* mix,
                     int64_t batch, float* y, int64_t pitch, int64_t n) {
  int64_t r = 0;
  for (; batch == 1 && r + 8 <= count; r += 8) {  // registers for eight factors: y is read and written half as often
    Axpy<E>::template run<8, 1>(basis, rows + r, column, mix + r, 1, y, pitch, n);
  }
  for (; r + kRows <= count; r += kRows) {
    axpy_rows<E, kRows>(basis, rows + r, column, mix + r * batch, batch, y, pitch, n);
  }
  switch (count - r) {
    case 3:
      return axpy_rows<E, 3>(basis, rows + r, column, mix + r * batch, batch, y, pitch, n);
    case 2:
      return axpy_rows<E, 2>(basis, rows + r, column, mix + r * batch, batch, y, pitch, n);
    case 1:
      return axpy_rows<E, 1>(basis, rows + r, column, mix + r * batch, batch, y, pitch, n);
    default:
      return;
  }
}

// What an Edit comes to for up to kMaxBatch gradients: who moves, who is only scaled, and which rows are needed at all.
struct EditPlan {
  int64_t moved[kMaxBatch], scaled[kMaxBatch];  // indices into the batch
  int64_t moves = 0, scalings = 0;
  int64_t* rows;  // [count], ascending
  float* mix;     // [count, moves]
  int64_t count = 0;
};

static int64_t edit_plan_bytes(const Basis& basis, int64_t batch) {
  return round_up(basis.rows * (sizeof(int64_t) + min64(batch, kMaxBatch) * sizeof(float)), 8);
}

static EditPlan plan_edit(const Basis& basis, const Edit& edit, int64_t first, int64_t batch, void* memory) {
  EditPlan plan;
  plan.rows = static_cast<int64_t*>(memory);
  plan.mix = reinterpret_cast<float*>(plan.rows + basis.rows);
  const int64_t k = basis.rows;
  for (int64_t b = first; b < first + batch; ++b) {
    const float* mix = edit.mix + b * k;
    bool finite = is_finite(edit.scale[b]), moves = false;
    for (int64_t r = 0; r < k; ++r) {
      finite = finite && is_finite(mix[r]);
      moves = moves || mix[r] != 0.0f;
    }
    if (finite && moves) plan.moved[plan.moves++] = b;
    if (finite && !moves && edit.scale[b] != 1.0f) plan.scaled[plan.scalings++] = b;
  }
  for (int64_t r = 0; r < k; ++r) {
    bool used = false;
    float* mix = plan.mix + plan.count * plan.moves;
    for (int64_t m = 0; m < plan.moves; ++m) {
      mix[m] = edit.mix[plan.moved[m] * k + r];
      used = used || mix[m] != 0.0f;
    }
    if (used) plan.rows[plan.count++] = r;
  }
  return plan;
}

// Columns [begin, begin + n) of the span: y = G + mix U of the gradients that move, plan.moves tiles of `pitch` floats.
template <class E>
static void sum_tile(const Basis& basis, const Span& span, const EditPlan& plan, int64_t begin, int64_t n, float* y,
                     int64_t pitch) {
  for (int64_t m = 0; m < plan.moves; ++m) {
    load_gradient<E>(gradient(span, plan.moved[m], begin), span.dtype, y + m * pitch, n);
  }
  axpy_all<E>(basis, plan.rows, plan.count, span.column + begin, plan.mix, plan.moves, y, pitch, n);
}

// G = scale * y, and scale * G of those that are only scaled. Takes the first tile of y for these.
template <class E>
static void store_tile(const Span& span, const Edit& edit, const EditPlan& plan, int64_t begin, int64_t n, float* y,
                       int64_t pitch) {
  for (int64_t m = 0; m < plan.moves; ++m) {
    store_gradient<E>(y + m * pitch, gradient(span, plan.moved[m], begin), span.dtype, n, edit.scale[plan.moved[m]]);
  }
  for (int64_t s = 0; s < plan.scalings; ++s) {
    void* g = gradient(span, plan.scaled[s], begin);
    load_gradient<E>(g, span.dtype, y, n);
    store_gradient<E>(y, g, span.dtype, n, edit.scale[plan.scaled[s]]);
  }
}

template <class E>
static void edit_stored(const Basis& basis, const Span& span, const Edit& edit) {
  for (int64_t first = 0; first < span.batch; first += kMaxBatch) {
    const int64_t batch = min64(span.batch - first, kMaxBatch);
    const int64_t tile = tile_length(basis, batch);
    const int64_t tiles_bytes = batch * tile * sizeof(float);
    float* y = static_cast<float*>(scratch(tiles_bytes + edit_plan_bytes(basis, batch)));
    const EditPlan plan = plan_edit(basis, edit, first, batch, y + batch * tile);
    if (plan.moves + plan.scalings == 0) continue;
    // Backwards: what pass 1 read last may still be in the last-level cache.
    for (int64_t begin = (span.length - 1) / tile * tile; begin >= 0; begin -= tile) {
      const int64_t n = min64(tile, span.length - begin);
      sum_tile<E>(basis, span, plan, begin, n, y, tile);
      store_tile<E>(span, edit, plan, begin, n, y, tile);
    }
  }
}

static void edit(const Basis& basis, const Span& span, const Edit& edit) {
  with_storage(basis.dtype, [&](auto type) { edit_stored<decltype(type)>(basis, span, edit); });
}

}  // namespace carerl::cpu::CARERL_ISA
