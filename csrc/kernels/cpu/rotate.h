// U <- Q [U; G] in place, alone or together with the edit of G.
#pragma once

#include "edit.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kRotateRows = 4;
// Vectors of columns: with 3 of them 12 sums, 3 operands and 1 factor are the 16 registers of AVX2; else a whole group.
template <class E>
constexpr int kRotateVectors = kVectors<E> == 1 ? 3 : kVectors<E>;

static bool all_finite(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!is_finite(x[i])) return false;
  }
  return true;
}

// sums[r] = sum_m q[r][m] packed[m] for R rows of q and V vectors of columns
template <int R, int V>
CARERL_INLINE void combine(const float* q, int64_t depth, const float* packed, int64_t pitch, Float (&sums)[R][V]) {
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Float{};
  }
  for (int64_t m = 0; m < depth; ++m) {
    Float value[V];
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) value[v] = load(packed + m * pitch + v * kWidth);
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      const Float factor = splat(q[r * depth + m]);
      CARERL_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += factor * value[v];
    }
  }
}

// save(r, column, vectors of one group, elements left of the row) for R rows of q times the packed rows. Whole groups
// say so by a constant: a look at the end of the row in the main loop would keep all sums in memory.
template <class E, int R, class Save>
CARERL_INLINE void combine_rows(const float* q, int64_t depth, const float* packed, int64_t pitch, int64_t n,
                                const Save& save) {
  constexpr int V = kRotateVectors<E>;
  int64_t i = 0;
  for (; i + V * kWidth <= n; i += V * kWidth) {
    Float sums[R][V];
    combine<R, V>(q, depth, packed + i, pitch, sums);
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      CARERL_UNROLL
      for (int v = 0; v < V; v += kVectors<E>) save(r, i + v * kWidth, &sums[r][v], kGroup<E>);
    }
  }
  for (; i < n; i += kGroup<E>) {
    Float sums[R][kVectors<E>];
    combine<R, kVectors<E>>(q, depth, packed + i, pitch, sums);
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) save(r, i, sums[r], n - i);
  }
}

// Rows [U; G] of a tile as floats, and room for rotated rows on their way to stochastic rounding.
struct RotateTile {
  int64_t depth, columns;  // rows of [U; G], elements a row
  float *packed, *out;     // [depth, columns], [kRotateRows, columns]
};

static int64_t rotate_columns(const Basis& basis, const Span& span) {
  return columns_within(kTileBytes, (basis.rows + span.batch + kRotateRows) * sizeof(float), kTile);
}

static RotateTile rotate_tile(const Basis& basis, const Span& span, int64_t columns, int64_t extra_bytes,
                              void** extra) {
  RotateTile tile;
  tile.depth = basis.rows + span.batch;
  tile.columns = columns;
  const int64_t floats = (tile.depth + kRotateRows) * columns;
  tile.packed = static_cast<float*>(scratch(floats * sizeof(float) + extra_bytes));
  tile.out = tile.packed + tile.depth * columns;
  *extra = tile.packed + floats;
  return tile;
}

// Rows [row, row + R) of the rotated bases.
template <class E, int R>
static void rotate_group(const Basis& basis, const Rotation& rotation, const RotateTile& tile, int64_t row,
                         int64_t column, int64_t n) {
  const float* q = rotation.q + row * tile.depth;
  typename E::Type* dst = element<E>(basis, row, column);
  const int64_t stride = basis.stride, pitch = tile.columns;  // stores could change what a reference names
  if (rotation.seed == 0 || __is_same(E, F32)) {
    combine_rows<E, R>(q, tile.depth, tile.packed, pitch, n, [=](int r, int64_t i, const Float* x, int64_t left) {
      store_group<E>(dst + r * stride + i, x, left);
    });
    return;
  }
  float* out = tile.out;
  combine_rows<E, R>(q, tile.depth, tile.packed, pitch, n, [=](int r, int64_t i, const Float* x, int64_t) {
    CARERL_UNROLL
    for (int v = 0; v < kVectors<E>; ++v) store(out + r * pitch + i + v * kWidth, x[v]);
  });
  constexpr int kDropped = __is_same(E, BF16) ? 16 : 13;
  for (int r = 0; r < R; ++r) {
    store_randomly<E, kDropped>(basis, row + r, column, tile.out + r * tile.columns, n, rotation.seed);
  }
}

// Without payloads in the NaN of wider gradients, which rounding to bf16 bases could carry into the sign.
template <class E>
static void clean(const Span& span, float* rows, int64_t pitch, int64_t n) {
  if (!__is_same(E, BF16) || span.dtype == DType::kBF16) return;
  for (int64_t b = 0; b < span.batch; ++b, rows += pitch) {
    for (int64_t i = 0; i < round_up(n, kGroup<E>); i += kWidth) store(rows + i, without_payload(load(rows + i)));
  }
}

template <class E>
static void rotate_packed(const Basis& basis, const Rotation& rotation, const RotateTile& tile, int64_t column,
                          int64_t n, Ahead& ahead) {
  int64_t row = 0;
  for (; row + kRotateRows <= rotation.rows; row += kRotateRows) {
    rotate_group<E, kRotateRows>(basis, rotation, tile, row, column, n);
    ahead.fetch();
  }
  switch (rotation.rows - row) {
    case 3:
      rotate_group<E, 3>(basis, rotation, tile, row, column, n);
      break;
    case 2:
      rotate_group<E, 2>(basis, rotation, tile, row, column, n);
      break;
    case 1:
      rotate_group<E, 1>(basis, rotation, tile, row, column, n);
      break;
    default:
      break;
  }
  for (row = rotation.rows; row < basis.rows; ++row) {
    __builtin_memset(element<E>(basis, row, column), 0, n * sizeof(typename E::Type));
  }
}

template <class E>
static void rotate_stored(const Basis& basis, const Span& span, const Rotation& rotation) {
  void* unused;
  const RotateTile tile = rotate_tile(basis, span, rotate_columns(basis, span), 0, &unused);
  const int64_t stretch = stretch_of(basis, span, tile.columns);
  const int64_t parts = stretch / tile.columns * (basis.rows / kRows + rotation.rows / kRotateRows);
  for (int64_t first = 0; first < span.length; first += stretch) {
    const int64_t end = min64(first + stretch, span.length);
    Ahead ahead(basis, span, end, min64(stretch, span.length - end), parts);
    for (int64_t begin = first; begin < end; begin += tile.columns) {
      const int64_t n = min64(tile.columns, end - begin);
      load_stack<E>(basis, span, begin, tile.packed, tile.columns, n, ahead);
      clean<E>(span, tile.packed + basis.rows * tile.columns, tile.columns, n);
      rotate_packed<E>(basis, rotation, tile, span.column + begin, n, ahead);
    }
  }
}

static void rotate(const Basis& basis, const Span& span, const Rotation& rotation) {
  if (!all_finite(rotation.q, rotation.rows * (basis.rows + span.batch))) return;
  with_gradient(basis.dtype, [&](auto type) { rotate_stored<decltype(type)>(basis, span, rotation); });
}

constexpr int kFewRows = 8;            // whose sums of one vector are registers, and hide the multiply-add's latency
constexpr int64_t kStripBytes = 256;   // of a row: of 24 rows this strip and the next, on its way, are inside L1
constexpr int64_t kFetchColumns = 32;  // between requests, else they wait for each other; a whole group of any type

// Every factor of q as a whole vector, column after column of kFewRows: an operand of the multiply-add.
static void spread_factors(const Rotation& rotation, int64_t depth, float* factors) {
  for (int64_t m = 0; m < depth; ++m) {
    for (int64_t r = 0; r < kFewRows; ++r, factors += kWidth) {
      store(factors, splat(r < rotation.rows ? rotation.q[r * depth + m] : 0.0f));
    }
  }
}

// Columns [begin, begin + n) of at most kFewRows rows, straight from how rows and gradients (G) are stored, rounded to
// nearest: all rows of a group are read before one is written.
template <class E, class G>
static void rotate_few(const Basis& basis, const Span& span, const Rotation& rotation, const float* factors,
                       int64_t begin, int64_t n, Ahead& ahead) {
  constexpr int V = kVectors<E>;
  typename E::Type* rows = element<E>(basis, 0, span.column + begin);
  const typename G::Type* grads = static_cast<const typename G::Type*>(gradient(span, 0, begin));
  const int64_t inputs = basis.rows, outputs = rotation.rows, batch = span.batch;
  const int64_t stride = basis.stride, grad_stride = span.stride;
  auto group = [=](int64_t i, int64_t left) {
    Float out[kFewRows][V];
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) {  // a row is read once for each, which costs less than keeping it
      Float sums[kFewRows] = {}, x[V];
      const float* f = factors;
      for (int64_t m = 0; m < inputs; ++m, f += kFewRows * kWidth) {
        load_group<E>(rows + m * stride + i, left, x);
        CARERL_UNROLL
        for (int r = 0; r < kFewRows; ++r) sums[r] += load(f + r * kWidth) * x[v];
      }
      for (int64_t b = 0; b < batch; ++b, f += kFewRows * kWidth) {
        load_arranged<E, G>(grads + b * grad_stride + i, left, x);
        if (__is_same(E, BF16) && !__is_same(G, BF16)) x[v] = without_payload(x[v]);
        CARERL_UNROLL
        for (int r = 0; r < kFewRows; ++r) sums[r] += load(f + r * kWidth) * x[v];
      }
      CARERL_UNROLL
      for (int r = 0; r < kFewRows; ++r) out[r][v] = sums[r];
    }
    CARERL_UNROLL
    for (int r = 0; r < kFewRows; ++r) {
      if (r < outputs) store_group<E>(rows + r * stride + i, out[r], left);
    }
  };
  int64_t i = 0;
  for (; i + kGroup<E> <= n; i += kGroup<E>) {
    if (i % kFetchColumns == 0) ahead.fetch();
    group(i, kGroup<E>);
  }
  if (i < n) group(i, n - i);
  for (int64_t r = outputs; r < inputs; ++r) __builtin_memset(rows + r * stride, 0, n * sizeof(typename E::Type));
}

// Edited gradients stay in y until the rows are rotated, which takes the gradients before the edit. Few rows of a
// domain pass in strips that L1 holds from the edit to the rotation, while memory works on the strips to come. Many are
// bound by arithmetic: stretches in L2, long enough for the hardware to foresee how rows go on, are rotated tile by
// tile.
template <class E>
static void edit_rotate_stored(const Basis& all, const Basis& domain, const Span& span, const Edit& change,
                               const Rotation& rotation) {
  const bool few = domain.rows <= kFewRows && span.batch <= kFewRows && (rotation.seed == 0 || __is_same(E, F32));
  const int64_t turns = (span.batch + kMaxBatch - 1) / kMaxBatch, batch = min64(span.batch, kMaxBatch);
  const int64_t plan_bytes = sizeof(EditPlan) + edit_plan_bytes(all, batch);
  const int64_t columns = few ? kStripBytes / element_size(all.dtype) : rotate_columns(domain, span);
  const int64_t stretch = few ? columns : stretch_of(all, span, columns);
  const int64_t depth = domain.rows + span.batch;
  void* extra;
  const int64_t factors_bytes = few ? depth * kFewRows * kWidth * sizeof(float) : 0;
  const int64_t extra_bytes = span.batch * stretch * sizeof(float) + factors_bytes + turns * plan_bytes;
  const RotateTile tile = rotate_tile(domain, span, columns, extra_bytes, &extra);
  float* y = static_cast<float*>(extra);
  float* factors = y + span.batch * stretch;
  EditPlan* plans = reinterpret_cast<EditPlan*>(reinterpret_cast<char*>(factors) + factors_bytes);
  char* memory = reinterpret_cast<char*>(plans + turns);
  for (int64_t turn = 0; turn < turns; ++turn, memory += edit_plan_bytes(all, batch)) {
    const int64_t first = turn * kMaxBatch;
    plans[turn] = plan_edit(all, change, first, min64(span.batch - first, kMaxBatch), memory);
  }
  if (few) spread_factors(rotation, depth, factors);
  for (int64_t first = 0; first < span.length; first += stretch) {
    const int64_t n = min64(stretch, span.length - first), next = first + stretch;
    for (int64_t turn = 0; turn < turns; ++turn) {
      sum_tile<E>(all, span, plans[turn], first, n, y + turn * kMaxBatch * stretch, stretch);
    }
    Ahead ahead(all, span, next, few ? min64(stretch, span.length - next) : 0, stretch / kFetchColumns);
    if (few) {
      with_gradient(span.dtype, [&](auto type) {
        rotate_few<E, decltype(type)>(domain, span, rotation, factors, first, n, ahead);
      });
    } else {
      for (int64_t begin = first; begin < first + n; begin += columns) {
        const int64_t width = min64(columns, first + n - begin);
        load_stack<E>(domain, span, begin, tile.packed, columns, width, ahead);
        clean<E>(span, tile.packed + domain.rows * columns, columns, width);
        rotate_packed<E>(domain, rotation, tile, span.column + begin, width, ahead);
      }
    }
    for (int64_t turn = 0; turn < turns; ++turn) {
      store_tile<E>(span, change, plans[turn], first, n, y + turn * kMaxBatch * stretch, stretch);
    }
  }
}

static void edit_rotate(const Basis& all, const Basis& domain, const Span& span, const Edit& change,
                        const Rotation& rotation) {
  if (!all_finite(rotation.q, rotation.rows * (domain.rows + span.batch))) return edit(all, span, change);
  with_gradient(all.dtype, [&](auto type) { edit_rotate_stored<decltype(type)>(all, domain, span, change, rotation); });
}

}  // namespace carerl::cpu::CARERL_ISA
