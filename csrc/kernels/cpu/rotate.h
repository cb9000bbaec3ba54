// U <- Q [U; G] in place, alone or together with the edit of G, and the quantiser.
#pragma once

#include "edit.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kRotateRows = 4, kRotateVectors = 3;

static bool all_finite(const float* x, int64_t n) {
  for (int64_t i = 0; i < n; ++i) {
    if (!is_finite(x[i])) return false;
  }
  return true;
}

// out[r] = sum_m q[r][m] packed[m] for R rows of q and V vectors of columns
template <int R, int V>
CARERL_INLINE void combine(const float* q, int64_t depth, const float* packed, float* out, int64_t pitch) {
  Float sums[R][V] = {};
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
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) store(out + r * pitch + v * kWidth, sums[r][v]);
  }
}

template <int R>
static void combine_rows(const float* q, int64_t depth, const float* packed, float* out, int64_t pitch, int64_t n) {
  int64_t i = 0;
  for (; i + kRotateVectors * kWidth <= n; i += kRotateVectors * kWidth) {
    combine<R, kRotateVectors>(q, depth, packed + i, out + i, pitch);
  }
  for (; i < n; i += kWidth) combine<R, 1>(q, depth, packed + i, out + i, pitch);
}

struct RotateTile {
  int64_t depth, columns;  // rows of [U; G], elements a row
  float *packed, *out;     // [depth, columns], [kRotateRows, columns]
};

static RotateTile rotate_tile(const Basis& basis, const Span& span, int64_t extra_bytes_per_column, int64_t extra_bytes,
                              void** extra) {
  RotateTile tile;
  tile.depth = basis.rows + span.batch;
  const int64_t per_column = (tile.depth + kRotateRows) * sizeof(float) + extra_bytes_per_column;
  tile.columns = columns_within(kStretchBytes, per_column, 2 * kTile);
  tile.packed = static_cast<float*>(scratch(per_column * tile.columns + extra_bytes));
  tile.out = tile.packed + tile.depth * tile.columns;
  *extra = tile.out + kRotateRows * tile.columns;
  return tile;
}

static void rotate_packed(const Basis& basis, const Rotation& rotation, const RotateTile& tile, int64_t column,
                          int64_t n) {
  for (int64_t row = 0; row < basis.rows; row += kRotateRows) {
    const int64_t used = rotation.rows > row ? min64(rotation.rows - row, kRotateRows) : 0;
    const float* q = rotation.q + row * tile.depth;
    switch (used) {
      case 4:
        combine_rows<4>(q, tile.depth, tile.packed, tile.out, tile.columns, n);
        break;
      case 3:
        combine_rows<3>(q, tile.depth, tile.packed, tile.out, tile.columns, n);
        break;
      case 2:
        combine_rows<2>(q, tile.depth, tile.packed, tile.out, tile.columns, n);
        break;
      case 1:
        combine_rows<1>(q, tile.depth, tile.packed, tile.out, tile.columns, n);
        break;
      default:
        break;
    }
    for (int64_t i = used * tile.columns; i < kRotateRows * tile.columns; ++i) tile.out[i] = 0;
    for (int64_t r = row; r < min64(row + kRotateRows, basis.rows); ++r) {
      store_basis(basis, r, column, tile.out + (r - row) * tile.columns, n, rotation.seed);
    }
  }
}

static void rotate(const Basis& basis, const Span& span, const Rotation& rotation) {
  if (!all_finite(rotation.q, rotation.rows * (basis.rows + span.batch))) return;
  void* unused;
  const RotateTile tile = rotate_tile(basis, span, 0, 0, &unused);
  for (int64_t begin = (span.length - 1) / tile.columns * tile.columns; begin >= 0; begin -= tile.columns) {
    const int64_t n = min64(tile.columns, span.length - begin);
    load_stack(basis, span, begin, tile.packed, tile.columns, n);
    rotate_packed(basis, rotation, tile, span.column + begin, n);
  }
}

static void edit_rotate(const Basis& all, const Basis& domain, const Span& span, const Edit& change,
                        const Rotation& rotation) {
  if (!all_finite(rotation.q, rotation.rows * (domain.rows + span.batch))) return edit(all, span, change);
  const int64_t batch = min64(span.batch, kMaxBatch);
  const int64_t turns = (span.batch + kMaxBatch - 1) / kMaxBatch;
  const int64_t plan_bytes = sizeof(EditPlan) + edit_plan_bytes(all, batch);
  void* extra;
  const RotateTile tile = rotate_tile(domain, span, batch * sizeof(float), turns * plan_bytes, &extra);
  float* y = static_cast<float*>(extra);
  EditPlan* plans = reinterpret_cast<EditPlan*>(y + batch * tile.columns);
  char* memory = reinterpret_cast<char*>(plans + turns);
  for (int64_t turn = 0; turn < turns; ++turn, memory += edit_plan_bytes(all, batch)) {
    const int64_t first = turn * kMaxBatch;
    plans[turn] = plan_edit(all, change, first, min64(span.batch - first, kMaxBatch), memory);
  }
  for (int64_t begin = (span.length - 1) / tile.columns * tile.columns; begin >= 0; begin -= tile.columns) {
    const int64_t n = min64(tile.columns, span.length - begin);
    load_stack(domain, span, begin, tile.packed, tile.columns,
               n);  // rows and gradients as they were; then both may be written
    for (int64_t turn = 0; turn < turns; ++turn) edit_tile(all, span, change, plans[turn], begin, n, y, tile.columns);
    rotate_packed(domain, rotation, tile, span.column + begin, n);
  }
}

static void quantize(const void* row, DType dtype, int64_t length, int64_t block, DType to, uint8_t* codes,
                     float* scales) {
  const float most = to == DType::kI8 ? 127.0f : 448.0f;
  float values[kFold];
  const int64_t step = min64(block, kFold);
  for (int64_t begin = 0; begin < length; begin += block, ++scales) {
    const int64_t end = min64(begin + block, length);
    Word largest = {};  // magnitudes order like their bits, NaN above all
    for (int64_t i = begin; i < end; i += step) {
      load_tile(at(row, dtype, i), dtype, values, min64(step, end - i));
      for (int64_t j = 0; j < min64(step, end - i); j += kWidth) {
        const Word magnitude = as_word(load(values + j)) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    uint32_t bits = 0;
    for (int lane = 0; lane < kWidth; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    const float scale = as_float(splat_word(bits))[0] / most;
    *scales = scale;
    for (int64_t i = begin; i < end; i += step) {
      const int64_t n = min64(step, end - i);
      load_tile(at(row, dtype, i), dtype, values, n);
      for (int64_t j = 0; j < n; ++j) {
        float code = scale > 0 ? values[j] / scale : 0.0f;
        code = code > most ? most : code < -most ? -most : code;  // subnormal scales are coarse
        if (code != code) code = 0.0f;                            // NaN: the scale says it
        codes[i + j] = to == DType::kF8 ? fp8_code(code)
                                        : static_cast<uint8_t>(static_cast<int8_t>(
                                              (code + 12582912.0f) - 12582912.0f));  // 1.5 * 2^23: nearest even
      }
    }
  }
}

}  // namespace carerl::cpu::CARERL_ISA
