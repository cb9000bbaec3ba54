// Pass 1: coefficients G U^T. Reads bases and gradients once.
//
// A block stages a tile of the gradients in shared memory as floats; each warp then streams its rows of the bases past
// it, kRows at a time with kChunks vectors of 16 bytes of each in flight: 128 bytes a thread, 64 KiB or more on an SM,
// where 18 KiB hide the latency of an H100 at full bandwidth (3.35 TB/s * 700 ns / 132 SMs). fp32 lanes last for one
// tile (64 products a lane and gradient), then go to fp64 totals of the slot. Several gradients beside bases of 8 or 16
// bits are in project_mma.cuh; those left here are beside fp32 bases, or fp16 bases with gradients of a wider range,
// of which tensor cores would drop bits.
#pragma once

#include "reduce.cuh"
#include "stage.cuh"

namespace carerl::cuda {

constexpr int kProjectRows = 4;
constexpr int kProjectTile = 2048;  // columns of one gradient's tile; several share the room, down to kSmallestTile
constexpr int kSmallestTile = 512;  // 32 lanes of 16 one-byte elements

// Where column x of a tile lies in shared memory: lanes, which own kWidth columns each, read four floats side by side.
template <class E>
CARERL_DEVICE int place(int x) {
  constexpr int kChunk = 32 * E::kWidth;
  return x / kChunk * kChunk + x % E::kWidth / 4 * 128 + x / E::kWidth % 32 * 4;
}

// sums[r * kBatch + b] += u[r] . g[b] over the columns of a tile that belong to this lane.
template <class E, int kBatch, int kChunks>
CARERL_DEVICE void dot_rows(const typename E::Type* const (&rows)[kProjectRows],
                            const float* const (&scales)[kProjectRows], int block_shift, int64_t column, int n,
                            bool aligned, const float* g, int tile, int batch, int lane,
                            float (&sums)[kProjectRows * kBatch]) {
  constexpr int kChunk = 32 * E::kWidth;
  for (int begin = 0; begin < n; begin += kChunks * kChunk) {
    uint4 raw[kChunks][kProjectRows];
    if (aligned && begin + kChunks * kChunk <= n) {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int r = 0; r < kProjectRows; ++r) {
          raw[c][r] = load_aligned<E>(rows[r] + begin + c * kChunk + lane * E::kWidth);
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < kChunks; ++c) {
#pragma unroll
        for (int r = 0; r < kProjectRows; ++r) {
          const int x = begin + c * kChunk + lane * E::kWidth;
          raw[c][r] = load<E>(rows[r] + x, n - x, aligned);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kChunks; ++c) {
      const int x = begin + c * kChunk + lane * E::kWidth;
      float scale[kProjectRows];
#pragma unroll
      for (int r = 0; r < kProjectRows; ++r) {
        if constexpr (E::kScaled) scale[r] = x < n ? scales[r][(column + x) >> block_shift] : 0.0f;
      }
      float part[kProjectRows] = {};
#pragma unroll
      for (int q = 0; q < E::kWidth / 4; ++q) {
        float u[kProjectRows][4];
#pragma unroll
        for (int r = 0; r < kProjectRows; ++r) {
          E::quad(raw[c][r], q, u[r]);
        }
        const float* at = g + begin + c * kChunk + q * 128 + lane * 4;
#pragma unroll
        for (int b = 0; b < kBatch; ++b) {
          // Groups of four: a batch of 5 costs 8, not 16. Chunks beyond the tile hold nothing to multiply with.
          if ((b % 4 == 0 && b >= batch) || (kChunks > 1 && x - lane * E::kWidth >= n)) break;
          const float4 v = *reinterpret_cast<const float4*>(at + b * tile);
#pragma unroll
          for (int r = 0; r < kProjectRows; ++r) {
            float& sum = E::kScaled && kBatch == 1 ? part[r] : sums[r * kBatch + b];
            sum += u[r][0] * v.x;
            sum += u[r][1] * v.y;
            sum += u[r][2] * v.z;
            sum += u[r][3] * v.w;
          }
        }
      }
      if constexpr (E::kScaled && kBatch == 1) {
#pragma unroll
        for (int r = 0; r < kProjectRows; ++r) sums[r] += scale[r] * part[r];
      }
    }
  }
}

// partials [slots, batch, rows]: fp64 totals of each slot. Shared memory: totals [batch, rows], then the tile
// [batch up to a multiple of 4 (or 1), tile].
// Two blocks an SM: 64 sums, four rows and their scales need the 168 registers that blocks of six warps leave.
constexpr int project_warps(int gradients) { return gradients == 16 ? 6 : 8; }

template <class E, int kBatch>
__global__ void __launch_bounds__(32 * project_warps(kBatch), 2)
    project_kernel(const __grid_constant__ Spans spans, const __grid_constant__ Basis basis, int tile,
                   double* partials) {
  CARERL_SHARED(shared);
  const int rows = static_cast<int>(basis.rows), outputs = spans.batch * rows;
  const int tiles = kBatch == 1 ? 1 : (spans.batch + 3) / 4 * 4;
  double* totals = reinterpret_cast<double*>(shared);
  float* g = reinterpret_cast<float*>(totals + ((outputs + 1) & ~1));
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const Slot slot = find_slot(spans, slot_index(spans));
  const bool aligned = rows_aligned(basis.data, basis.stride, sizeof(typename E::Type));

  for (int i = threadIdx.x; i < outputs; i += blockDim.x) totals[i] = 0.0;
  for (int i = threadIdx.x; i < (tiles - spans.batch) * tile; i += blockDim.x) g[spans.batch * tile + i] = 0.0f;
  for (int64_t begin = slot.begin; begin < slot.end; begin += tile) {
    const int n = static_cast<int>(min64(tile, slot.end - begin));
    __syncthreads();  // everybody is done with the tile before
    stage_gradients(spans, slot, begin, n, (n + kSmallestTile - 1) / kSmallestTile * kSmallestTile,
                    [&](int b, int x, const float (&four)[4]) {
                      *reinterpret_cast<float4*>(g + b * tile + place<E>(x)) =
                          make_float4(four[0], four[1], four[2], four[3]);
                    });
    __syncthreads();
    for (int row = warp * kProjectRows; row < rows; row += warps * kProjectRows) {
      const typename E::Type* from[kProjectRows];
      const float* scales[kProjectRows];
#pragma unroll
      for (int r = 0; r < kProjectRows; ++r) {  // rows beyond the last one are the last one again
        const int64_t source = min64(row + r, rows - 1);
        from[r] = static_cast<const typename E::Type*>(basis.data) + source * basis.stride + slot.column + begin;
        scales[r] = basis.scales + source * basis.blocks;
      }
      float sums[kProjectRows * kBatch] = {};
      dot_rows<E, kBatch, kBatch == 1 ? 2 : 1>(from, scales, basis.block_shift, slot.column + begin, n, aligned, g,
                                               tile, spans.batch, lane, sums);
      constexpr int kValues = kProjectRows * kBatch, kLeft = kValues > 32 ? kValues / 32 : 1;
      const int first = sum_over_warp(sums, lane);
      if (kValues >= 32 || lane % (32 / (kValues < 32 ? kValues : 32)) == 0) {
#pragma unroll
        for (int i = 0; i < kLeft; ++i) {  // nobody else ever adds to these
          const int r = (first + i) / kBatch, b = (first + i) % kBatch;
          if (row + r < rows && b < spans.batch) totals[b * rows + row + r] += sums[i];
        }
      }
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < outputs; i += blockDim.x) partials[slot_index(spans) * outputs + i] = totals[i];
}

}  // namespace carerl::cuda
