// Pass 2: G <- scale * (G + mix U). Reads the rows that any gradient uses, reads and writes the gradients, rounds once.
//
// A thread owns the columns of one 16-byte vector of the bases, for kGradients gradients at a time; the threads of more
// of them sit in the same block and find the rows in L1. Four rows are in flight: 64 bytes a thread.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

constexpr int kEditRows = 4;
enum Change : int { kLeave, kScale, kMove };

// What an Edit comes to, in shared memory: what happens to each gradient, and the rows that any of them needs with
// their factors (zero for gradients that do not move).
struct EditPlan {
  int* change;  // [batch]
  int* rows;    // [count], ascending
  float* mix;   // [count, pitch], pitch = batch up to a multiple of kGradients
  int count, pitch;
  bool any;
};

// Bytes of shared memory of a plan; the same on the host.
__host__ __device__ static inline int64_t edit_plan_bytes(int64_t rows, int64_t batch, int gradients) {
  const int64_t pitch = (batch + gradients - 1) / gradients * gradients;
  return ((pitch + 2 + rows + 3) / 4 * 4 + (rows + 3) / 4 * 4 * pitch) * 4;
}

// Made by all threads of the block, which meet at its barriers.
template <int kGradients>
CARERL_DEVICE EditPlan plan_edit(const Edit& edit, int rows, int batch, unsigned char* memory) {
  EditPlan plan;
  plan.pitch = (batch + kGradients - 1) / kGradients * kGradients;
  plan.change = reinterpret_cast<int*>(memory);
  int* found = plan.change + plan.pitch;  // count, any
  plan.rows = found + 2;
  plan.mix = reinterpret_cast<float*>(memory) + (plan.pitch + 2 + rows + 3) / 4 * 4;
  const int thread = linear_thread(), threads = linear_threads(), lane = thread % 32;
  for (int b = thread / 32; b < batch; b += threads / 32) {
    const float scale = edit.scale[b];
    bool finite = is_finite(scale), moves = false;
    for (int r = lane; r < rows; r += 32) {
      const float mix = edit.mix[static_cast<int64_t>(b) * rows + r];
      finite = finite && is_finite(mix);
      moves = moves || mix != 0.0f;
    }
    finite = __all_sync(kAllLanes, finite);
    moves = __any_sync(kAllLanes, moves);
    if (lane == 0) plan.change[b] = !finite ? kLeave : moves ? kMove : scale != 1.0f ? kScale : kLeave;
  }
  __syncthreads();
  if (thread < 32) {
    int count = 0;
    for (int first = 0; first < rows; first += 32) {
      bool used = false;
      for (int b = 0; b < batch && first + lane < rows; ++b) {
        used = used || (plan.change[b] == kMove && edit.mix[static_cast<int64_t>(b) * rows + first + lane] != 0.0f);
      }
      const unsigned votes = __ballot_sync(kAllLanes, used);
      if (used) plan.rows[count + __popc(votes & ((1u << lane) - 1))] = first + lane;
      count += __popc(votes);
    }
    bool any = false;
    for (int b = lane; b < batch; b += 32) any = any || plan.change[b] != kLeave;
    any = __any_sync(kAllLanes, any);
    if (lane == 0) found[0] = count, found[1] = any;
  }
  __syncthreads();
  plan.count = found[0];
  plan.any = found[1] != 0;
  for (int i = thread; i < plan.count * plan.pitch; i += threads) {
    const int row = plan.rows[i / plan.pitch], b = i % plan.pitch;
    plan.mix[i] = b < batch && plan.change[b] == kMove ? edit.mix[static_cast<int64_t>(b) * rows + row] : 0.0f;
  }
  __syncthreads();
  return plan;
}

// y[c] += mix[c] * u for one vector of a row.
template <class E, int kGradients>
CARERL_DEVICE void add_row(const uint4& raw, float scale, const float* mix, float (&y)[kGradients][E::kWidth]) {
  float factor[kGradients];
#pragma unroll
  for (int c = 0; c < kGradients; ++c) factor[c] = mix[c] * scale;
#pragma unroll
  for (int q = 0; q < E::kWidth / 4; ++q) {
    float u[4];
    E::quad(raw, q, u);
#pragma unroll
    for (int c = 0; c < kGradients; ++c) {
#pragma unroll
      for (int i = 0; i < 4; ++i) y[c][4 * q + i] += factor[c] * u[i];
    }
  }
}

// Columns [begin, end) of a slot, by all threads of the block: x over columns, y over groups of gradients.
template <class E, int kGradients>
CARERL_DEVICE void edit_columns(const Spans& spans, const Basis& basis, const Slot& slot, int64_t begin, int64_t end,
                                const EditPlan& plan, const float* scales) {
  constexpr int W = E::kWidth;
  const bool aligned = rows_aligned(basis.data, basis.stride, sizeof(typename E::Type));
  for (int64_t at = begin + threadIdx.x * W; at < end; at += blockDim.x * W) {
    const int64_t n = end - at, column = slot.column + at;
    const typename E::Type* from = static_cast<const typename E::Type*>(basis.data) + column;
    for (int first = threadIdx.y * kGradients; first < spans.batch; first += blockDim.y * kGradients) {
      float y[kGradients][W] = {};
      with_gradient_type(spans.dtype, [&](auto type) {
        using G = decltype(type);
        const bool dense = gradients_aligned<G>(spans, slot);
#pragma unroll
        for (int c = 0; c < kGradients; ++c) {
          if (first + c < spans.batch && plan.change[first + c] != kLeave) {
            load_values<G, W>(gradient<G>(spans, slot, first + c, at), n, dense, y[c]);
          }
        }
      });
      int r = 0;
      for (; r + kEditRows <= plan.count; r += kEditRows) {
        uint4 raw[kEditRows];
        float scale[kEditRows];
        if (aligned && n >= W) {
#pragma unroll
          for (int i = 0; i < kEditRows; ++i) raw[i] = load_aligned<E>(from + plan.rows[r + i] * basis.stride);
        } else {
#pragma unroll
          for (int i = 0; i < kEditRows; ++i) raw[i] = load<E>(from + plan.rows[r + i] * basis.stride, n, aligned);
        }
#pragma unroll
        for (int i = 0; i < kEditRows; ++i) scale[i] = scale_at<E>(basis, plan.rows[r + i], column);
#pragma unroll
        for (int i = 0; i < kEditRows; ++i) {
          add_row<E, kGradients>(raw[i], scale[i], plan.mix + (r + i) * plan.pitch + first, y);
        }
      }
      for (; r < plan.count; ++r) {
        const uint4 raw = load<E>(from + plan.rows[r] * basis.stride, n, aligned);
        add_row<E, kGradients>(raw, scale_at<E>(basis, plan.rows[r], column), plan.mix + r * plan.pitch + first, y);
      }
      with_gradient_type(spans.dtype, [&](auto type) {
        using G = decltype(type);
        const bool dense = gradients_aligned<G>(spans, slot);
#pragma unroll
        for (int c = 0; c < kGradients; ++c) {
          if (first + c >= spans.batch || plan.change[first + c] == kLeave) continue;
          const float scale = scales[first + c];
          store_values<G, W>(gradient<G>(spans, slot, first + c, at), n, dense,
                             [&](int i) { return G::narrow(y[c][i] * scale); });
        }
      });
    }
  }
}

// The mix and scale that belong to a slot.
CARERL_DEVICE Edit edit_of(const Edit& all, const Slot& slot, int64_t rows) {
  return {all.mix + slot.group * rows, all.scale + slot.group};
}

// Blocks an SM are said, here and elsewhere: left alone, ptxas spills a register or two for one block more.
template <class E, int kGradients>
__global__ void __launch_bounds__(256, kGradients == 1 ? 3 : 2)
    edit_kernel(const __grid_constant__ Spans spans, const __grid_constant__ Basis basis, Edit all) {
  CARERL_SHARED(shared);
  const Slot slot = find_slot(spans, slot_from_the_end(spans));
  const Edit edit = edit_of(all, slot, basis.rows);
  const EditPlan plan = plan_edit<kGradients>(edit, static_cast<int>(basis.rows), spans.batch, shared);
  if (plan.any) edit_columns<E, kGradients>(spans, basis, slot, slot.begin, slot.end, plan, edit.scale);
}

}  // namespace carerl::cuda
