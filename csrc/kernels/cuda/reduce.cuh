// Sums over lanes, and the second stage of pass 1: fp64 partials of the slots, added up in a fixed order.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

constexpr int kReduceColumns = 32, kReduceSlices = 16;

// Sums V values over the lanes of a warp with about V + 5 shuffles instead of 5 V: in each step a lane hands half of
// its kLeft values over and keeps the other half. Returns the index of the first of the max(V / 32, 1) sums left in
// `values`; with V < 32, lanes that are multiples of 32 / V hold one each.
template <class T, int V, int kLeft = V, int kOffset = 16>
CARERL_DEVICE int sum_over_warp(T (&values)[V], int lane) {
  if constexpr (kOffset == 0) {
    return 0;
  } else if constexpr (kLeft == 1) {
    values[0] += __shfl_xor_sync(kAllLanes, values[0], kOffset);
    return sum_over_warp<T, V, 1, kOffset / 2>(values, lane);
  } else {
    constexpr int kHalf = kLeft / 2;
    const bool upper = (lane & kOffset) != 0;
#pragma unroll
    for (int i = 0; i < kHalf; ++i) {
      const T sent = upper ? values[i] : values[i + kHalf];
      const T kept = upper ? values[i + kHalf] : values[i];
      values[i] = kept + __shfl_xor_sync(kAllLanes, sent, kOffset);
    }
    return (upper ? kHalf : 0) + sum_over_warp<T, V, kHalf, kOffset / 2>(values, lane);
  }
}

// Where the sum of partial i goes: [group, batch, K] from a turn of `rows` rows and `batch` gradients at (row, b).
struct Outputs {
  int64_t batch, rows;              // of the turn; with `square` != 0 the sums are those of a Gram matrix instead
  int64_t first_batch, first_row;   // of the turn within the result
  int64_t total_batch, total_rows;  // of the result
  int64_t square;                   // K + B: both triangles are filled from the upper one
};

// A block adds up 32 neighbouring partials over slots [first, last) of group blockIdx.y: 16 threads each take every
// 16th slot, and their sums are added in order.
template <class Out>
__global__ void __launch_bounds__(kReduceColumns* kReduceSlices)
    reduce_kernel(const __grid_constant__ Spans spans, int64_t slots, Outputs shape, const double* partials, Out* out) {
  CARERL_SHARED(shared);
  double* sums = reinterpret_cast<double*>(shared);  // [slices, columns]
  const int64_t width = shape.square ? shape.square * shape.square : shape.batch * shape.rows;
  const int64_t i = static_cast<int64_t>(blockIdx.x) * kReduceColumns + threadIdx.x;
  int64_t first = 0, last = slots;
  if (spans.first_group >= 0) {
    first = spans.span[blockIdx.y].first_slot;
    if (static_cast<int>(blockIdx.y) + 1 < spans.count) last = spans.span[blockIdx.y + 1].first_slot;
  }
  double sum = 0.0;
  if (i < width) {
    int64_t source = i;
    if (shape.square) {
      const int64_t r = i / shape.square, c = i % shape.square;
      source = r <= c ? i : c * shape.square + r;
    }
#pragma unroll 4
    for (int64_t slot = first + threadIdx.y; slot < last; slot += kReduceSlices) sum += partials[slot * width + source];
  }
  sums[threadIdx.y * kReduceColumns + threadIdx.x] = sum;
  __syncthreads();
  if (threadIdx.y != 0 || i >= width) return;
  sum = 0.0;
  for (int slice = 0; slice < kReduceSlices; ++slice) sum += sums[slice * kReduceColumns + threadIdx.x];
  const int64_t group = (spans.first_group < 0 ? 0 : spans.first_group) + blockIdx.y;
  if (shape.square) {
    out[group * width + i] = static_cast<Out>(sum);
  } else {
    const int64_t b = shape.first_batch + i / shape.rows, row = shape.first_row + i % shape.rows;
    out[(group * shape.total_batch + b) * shape.total_rows + row] = static_cast<Out>(sum);
  }
}

}  // namespace carerl::cuda
