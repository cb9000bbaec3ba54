// Tiles of gradients and bases as floats in shared memory, by all threads of a block.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

// Where four columns from x on lie in a row of `tile` floats: threads that read or write eight columns, four at a time,
// then find theirs side by side.
CARERL_DEVICE int halved(int x, int tile) { return x / 4 % 2 * (tile / 2) + x / 8 * 4; }

// Vectors of a tile that a thread has asked for before it looks at the first.
constexpr int kStaged = 4;

// put(row, x, four floats) for `rows` rows of `padded` columns of which n exist, zeros beyond, by all threads. at(row,
// x) is where elements are, scale(row, x) what they are multiplied with.
template <class E, class At, class Scale, class Put>
CARERL_DEVICE void stage(int rows, int n, int padded, bool aligned, const At& at, const Scale& scale, const Put& put) {
  const int vectors = padded / E::kWidth, total = rows * vectors, threads = linear_threads();
  const auto deliver = [&](int i, const uint4& raw) {
    const int row = i / vectors, x = i % vectors * E::kWidth;
    const float factor = E::kScaled && x < n ? scale(row, x) : 1.0f;
#pragma unroll
    for (int q = 0; q < E::kWidth / 4; ++q) {
      float four[4];
      E::quad(raw, q, four);
      if constexpr (E::kScaled) {
#pragma unroll
        for (int j = 0; j < 4; ++j) four[j] *= factor;
      }
      put(row, x + 4 * q, four);
    }
  };
  const auto where = [&](int i) { return at(i / vectors, i % vectors * E::kWidth); };
  if (aligned && n >= padded) {
    for (int first = linear_thread(); first < total; first += kStaged * threads) {
      uint4 raw[kStaged];
#pragma unroll
      for (int s = 0; s < kStaged; ++s) {
        const int i = first + s * threads;  // beyond the last one the last one again: a branch would part the loads
        raw[s] = load_aligned<E>(where(i < total ? i : total - 1));
      }
#pragma unroll
      for (int s = 0; s < kStaged; ++s) {
        if (first + s * threads < total) deliver(first + s * threads, raw[s]);
      }
    }
    return;
  }
  for (int i = linear_thread(); i < total; i += threads) {
    deliver(i, load<E>(where(i), n - i % vectors * E::kWidth, aligned));
  }
}

// Columns [at, at + n) of all gradients of a slot.
template <class Put>
CARERL_DEVICE void stage_gradients(const Spans& spans, const Slot& slot, int64_t at, int n, int padded,
                                   const Put& put) {
  with_gradient_type(spans.dtype, [&](auto type) {
    using E = decltype(type);
    stage<E>(
        spans.batch, n, padded, gradients_aligned<E>(spans, slot),
        [&](int b, int x) { return gradient<E>(spans, slot, b, at + x); }, [](int, int) { return 1.0f; }, put);
  });
}

// Rows of the bases, from `column` on.
template <class Put>
CARERL_DEVICE void stage_basis(const Basis& basis, int64_t column, int n, int padded, const Put& put) {
  with_basis_type(basis.dtype, [&](auto type) {
    using E = decltype(type);
    stage<E>(
        static_cast<int>(basis.rows), n, padded, rows_aligned(basis.data, basis.stride, sizeof(typename E::Type)),
        [&](int row, int x) {
          return static_cast<const typename E::Type*>(basis.data) + row * basis.stride + column + x;
        },
        [&](int row, int x) { return scale_at<E>(basis, row, column + x); }, put);
  });
}

}  // namespace carerl::cuda
