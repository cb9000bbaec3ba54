// Pass 1 for several gradients and bases of 8 or 16 bits: coefficients G U^T in tensor cores.
//
// Products of numbers of 16 bits are exact there; int8 and fp8 codes are bf16 numbers, and an fp32 gradient is the sum
// of three. Sums are truncated, so a chunk of 32 or 64 columns is added up there, a run of 256 in fp32, a slot in fp64.
//
// Operands need neither shared memory nor shuffles: which column stands for which k of a product is free as long as
// both sides agree, so a lane loads 16 bytes of its row and these are its operands of the next products. A warp has 32
// rows of the bases and up to 16 gradients; warps of a block share its rows out among them, and what warps are left
// over take turns with the columns. Where they have the same columns, gradients come from L1.
#pragma once

#include <type_traits>

#include "mma.cuh"

namespace carerl::cuda {

constexpr int kMmaRows = 32, kMmaWarps = 4;
constexpr int kMmaRun = 256;

// How a block shares out the rows: groups of 32, of which `across` are done at once, in as few turns as can be.
struct RowGroups {
  int groups, turns, across, slices;
  __host__ __device__ int threads() const { return 32 * across * slices; }
  // Sums of a thread for `tiles` of eight gradients.
  __host__ __device__ int sums(int tiles) const { return turns * 8 * tiles; }
};
__host__ __device__ static inline RowGroups row_groups(int rows) {
  const int groups = (rows + kMmaRows - 1) / kMmaRows, turns = (groups + kMmaWarps - 1) / kMmaWarps;
  const int across = (groups + turns - 1) / turns;
  return {groups, turns, across, kMmaWarps / across};
}

// The upper halves of two floats, as bf16 numbers the first of which comes first.
CARERL_DEVICE uint32_t upper_halves(float first, float second) {
  return __byte_perm(__float_as_uint(first), __float_as_uint(second), 0x7632);
}

// Elements 4 step to 4 step + 3 of 16 bytes of a row.
template <class E>
CARERL_DEVICE void row_operand(const uint4& raw, int step, uint32_t* first, uint32_t* second) {
  if constexpr (sizeof(typename E::Type) == 2) {
    *first = word(raw, 2 * step);
    *second = word(raw, 2 * step + 1);
  } else {
    float four[4];
    E::quad(raw, step, four);
    *first = upper_halves(four[0], four[1]);
    *second = upper_halves(four[2], four[3]);
  }
}

// The same elements of a gradient, as terms of which the first is the largest.
template <class G, int kTerms, int kVectors>
CARERL_DEVICE void gradient_operand(const uint4 (&raw)[kVectors], int step, uint32_t (&terms)[kTerms][2]) {
  constexpr int kQuads = G::kWidth / 4;
  const uint4& vector = raw[step / kQuads];
  if constexpr (kTerms == 1) {
    terms[0][0] = word(vector, 2 * (step % kQuads));
    terms[0][1] = word(vector, 2 * (step % kQuads) + 1);
  } else {
    float rest[4];
    G::quad(vector, step % kQuads, rest);
#pragma unroll
    for (int term = 0; term < kTerms; ++term) {
      terms[term][0] = upper_halves(rest[0], rest[1]);
      terms[term][1] = upper_halves(rest[2], rest[3]);
#pragma unroll
      for (int i = 0; i < 4; ++i) rest[i] -= __uint_as_float(__float_as_uint(rest[i]) & 0xffff0000u);
    }
  }
}

// bf16 numbers that add up to a gradient; fp16 gradients are operands as they are beside fp16 bases.
template <class E, class G>
constexpr int kGradientTerms = std::is_same_v<G, F32>                              ? 3
                               : std::is_same_v<G, F16> && !std::is_same_v<E, F16> ? 2
                                                                                   : 1;

// sums[half][tile] += products of rows [16 half, 16 half + 16) with gradients [8 tile, 8 tile + 8), over n columns. A
// lane has four of the rows and one gradient of each tile, from `begin` on, where `column` of the bases is.
template <class E, class G, int kTiles>
CARERL_DEVICE void add_run(const typename E::Type* const (&rows)[4], const float* const (&scales)[4], int block_shift,
                           bool aligned, const typename G::Type* const (&grads)[kTiles], bool dense, int64_t column,
                           int n, int t, float (&sums)[2][kTiles][4]) {
  constexpr int W = E::kWidth, kChunk = 4 * W, kTerms = kGradientTerms<E, G>, kVectors = W / G::kWidth;
  constexpr int kAtOnce = W == 8 && G::kWidth == 8 ? 2 : 1;  // chunks in flight
  for (int begin = 0; begin < n; begin += kAtOnce * kChunk) {
    uint4 raw[kAtOnce][4], gradient[kAtOnce][kTiles][kVectors];
    const int own = begin + t * W;
    if (aligned && dense && begin + kAtOnce * kChunk <= n) {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
#pragma unroll
        for (int r = 0; r < 4; ++r) raw[c][r] = load_aligned<E>(rows[r] + own + c * kChunk);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v)
            gradient[c][tile][v] = load_aligned<G>(grads[tile] + own + c * kChunk + v * G::kWidth);
        }
      }
    } else {
#pragma unroll
      for (int c = 0; c < kAtOnce; ++c) {
        const int x = own + c * kChunk;
#pragma unroll
        for (int r = 0; r < 4; ++r) raw[c][r] = load<E>(rows[r] + x, n - x, aligned);
#pragma unroll
        for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
          for (int v = 0; v < kVectors; ++v)
            gradient[c][tile][v] = load<G>(grads[tile] + x + v * G::kWidth, n - x - v * G::kWidth, dense);
        }
      }
    }
#pragma unroll
    for (int c = 0; c < kAtOnce; ++c) {
      // A chunk of scaled elements has one scale a row, or two where blocks are of 32: then the lanes of one block
      // multiply after those of the other, with zeros in their place.
      const bool two_blocks = E::kScaled && block_shift == 5;
      const int start = begin + c * kChunk, parts = two_blocks && start + kChunk / 2 < n ? 2 : 1;
#pragma unroll 1
      for (int part = 0; part < parts; ++part) {
        float products[2][kTiles][4] = {};
        const uint32_t mask = two_blocks && t / 2 != part ? 0 : ~0u;
#pragma unroll
        for (int step = 0; step < W / 4; ++step) {
          uint32_t a[2][4];
#pragma unroll
          for (int half = 0; half < 2; ++half) {
#pragma unroll
            for (int i = 0; i < 2; ++i) {
              uint4 bits = raw[c][2 * half + i];
              if constexpr (E::kScaled) bits.x &= mask, bits.y &= mask, bits.z &= mask, bits.w &= mask;
              row_operand<E>(bits, step, &a[half][i], &a[half][2 + i]);
            }
          }
#pragma unroll
          for (int tile = 0; tile < kTiles; ++tile) {
            uint32_t terms[kTerms][2];
            gradient_operand<G>(gradient[c][tile], step, terms);
#pragma unroll
            for (int term = kTerms - 1; term >= 0; --term) {
#pragma unroll
              for (int half = 0; half < 2; ++half)
                mma_half<std::is_same_v<E, F16>>(products[half][tile], a[half], terms[term]);
            }
          }
        }
#pragma unroll
        for (int half = 0; half < 2; ++half) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float scale = 1.0f;
            if constexpr (E::kScaled) scale = scales[2 * half + i][(column + start + 32 * part) >> block_shift];
#pragma unroll
            for (int tile = 0; tile < kTiles; ++tile) {
#pragma unroll
              for (int j = 0; j < 2; ++j) sums[half][tile][2 * i + j] += scale * products[half][tile][2 * i + j];
            }
          }
        }
      }
    }
  }
}

// partials [slots, batch, rows]: fp64 totals of each slot. Shared memory: the totals of every thread, [sums, threads].
template <class E, class G, int kTiles>
__global__ void __launch_bounds__(32 * kMmaWarps, 3)
    project_mma_kernel(const __grid_constant__ Spans spans, const __grid_constant__ Basis basis, double* partials) {
  CARERL_SHARED(shared);
  double* totals = reinterpret_cast<double*>(shared);
  const int rows = static_cast<int>(basis.rows), threads = blockDim.x;
  const RowGroups shape = row_groups(rows);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int across = warp % shape.across, slice = warp / shape.across;
  const Slot slot = find_slot(spans, slot_index(spans));
  const bool aligned = rows_aligned(basis.data, basis.stride, sizeof(typename E::Type));
  const bool dense = gradients_aligned<G>(spans, slot);

  for (int i = 0; i < shape.sums(kTiles); ++i) totals[i * threads + threadIdx.x] = 0.0;
  for (int64_t begin = slot.begin + slice * kMmaRun; begin < slot.end; begin += shape.slices * kMmaRun) {
    const int n = static_cast<int>(min64(kMmaRun, slot.end - begin));
    const int64_t column = slot.column + begin;
    const typename G::Type* grads[kTiles];
#pragma unroll
    for (int tile = 0; tile < kTiles; ++tile) {  // gradients and rows beyond the last one are the last one again
      const int b = 8 * tile + g;
      grads[tile] = gradient<G>(spans, slot, b < spans.batch ? b : spans.batch - 1, begin);
    }
    for (int turn = 0; turn < shape.turns; ++turn) {
      const int group = turn * shape.across + across;
      if (group >= shape.groups) break;
      const typename E::Type* from[4];
      const float* scales[4];
#pragma unroll
      for (int r = 0; r < 4; ++r) {
        const int64_t row = min64(group * kMmaRows + 8 * r + g, rows - 1);
        from[r] = static_cast<const typename E::Type*>(basis.data) + row * basis.stride + column;
        scales[r] = basis.scales + row * basis.blocks;
      }
      float sums[2][kTiles][4] = {};
      add_run<E, G, kTiles>(from, scales, basis.block_shift, aligned, grads, dense, column, n, t, sums);
      double* own = totals + turn * 8 * kTiles * threads + threadIdx.x;
#pragma unroll
      for (int i = 0; i < 8 * kTiles; ++i) own[i * threads] += sums[i / (4 * kTiles)][i / 4 % kTiles][i % 4];
    }
  }
  __syncthreads();
  for (int i = threadIdx.x; i < spans.batch * rows; i += threads) {
    const int b = i / rows, row = i % rows, group = row / kMmaRows, half = row % kMmaRows / 16;
    const int sum = (group / shape.across * 2 + half) * 4 * kTiles + b / 8 * 4 + row % 16 / 8 * 2 + b % 2;
    const int holder = group % shape.across * 32 + row % 8 * 4 + b % 8 / 2;
    double total = 0.0;
    for (int s = 0; s < shape.slices; ++s) total += totals[sum * threads + s * shape.across * 32 + holder];
    partials[slot_index(spans) * spans.batch * rows + i] = total;
  }
}

}  // namespace carerl::cuda
