// Gram matrix of [U; G]. Products are taken and added in fp64, where those of fp32 numbers are exact: streaming PCA
// divides by eigenvalues down to 1e-6 of this matrix. Data-centre GPUs have half the fp32 rate for it (H100: 34
// Tflop/s, K + B = 25 rows of bf16 take 1.3 times as long as reading them); consumer GPUs have 1/64 and are bound by
// it. fp64 tensor cores would help beyond K of about 64; they are left out, being beyond what the tests can emulate.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

constexpr int kGramBlock = 4;  // rows and columns of the block of sums in a thread's registers
constexpr int kGramThreads = 256;

// Pair p of the blocks (i, j) with i <= j of a matrix of `blocks` x `blocks`.
CARERL_DEVICE void block_pair(int p, int blocks, int* i, int* j) {
  int row = 0;
  while (p >= blocks - row) p -= blocks - row++;
  *i = row;
  *j = row + p;
}

// partials [slots, size, size], upper triangle. Shared memory: the tile [size up to a multiple of 4, tile + 1] in fp64;
// afterwards the sums [slices, pairs, 16]. Neighbouring threads have neighbouring pairs and the same column, so that a
// warp reads few different numbers, and the odd pitch spreads those over the banks. Pairs beyond 256 are other blocks'.
static __global__ void __launch_bounds__(kGramThreads, 3)
    gram_kernel(const __grid_constant__ Spans spans, const __grid_constant__ Basis basis, int tile, double* partials) {
  CARERL_SHARED(shared);
  double* stack = reinterpret_cast<double*>(shared);
  const int rows = static_cast<int>(basis.rows), size = rows + spans.batch;
  const int blocks = (size + kGramBlock - 1) / kGramBlock, pitch = tile + 1;
  const int first_pair = blockIdx.y * kGramThreads, all_pairs = blocks * (blocks + 1) / 2;
  const int pairs = all_pairs - first_pair < kGramThreads ? all_pairs - first_pair : kGramThreads;
  const int slices = kGramThreads / pairs, slice = threadIdx.x / pairs, pair = threadIdx.x % pairs;
  const Slot slot = find_slot(spans, slot_index(spans));
  int block_row, block_column;
  block_pair(first_pair + pair, blocks, &block_row, &block_column);

  for (int i = size * pitch + threadIdx.x; i < blocks * kGramBlock * pitch; i += kGramThreads) stack[i] = 0.0;
  double sums[kGramBlock][kGramBlock] = {};
  for (int64_t begin = slot.begin; begin < slot.end; begin += tile) {
    const int n = static_cast<int>(min64(tile, slot.end - begin));
    __syncthreads();  // everybody is done with the tile before
    const auto put = [&](double* row, int x, const float (&four)[4]) {
#pragma unroll
      for (int i = 0; i < 4; ++i) row[x + i] = four[i];
    };
    stage_basis(basis, slot.column + begin, n, tile,
                [&](int row, int x, const float (&four)[4]) { put(stack + row * pitch, x, four); });
    stage_gradients(spans, slot, begin, n, tile,
                    [&](int b, int x, const float (&four)[4]) { put(stack + (rows + b) * pitch, x, four); });
    __syncthreads();
    if (slice >= slices) continue;
    const double *left = stack + block_row * kGramBlock * pitch, *right = stack + block_column * kGramBlock * pitch;
    for (int x = slice; x < tile; x += slices) {
      double a[kGramBlock], b[kGramBlock];
#pragma unroll
      for (int i = 0; i < kGramBlock; ++i) a[i] = left[i * pitch + x];
#pragma unroll
      for (int j = 0; j < kGramBlock; ++j) b[j] = right[j * pitch + x];
#pragma unroll
      for (int i = 0; i < kGramBlock; ++i) {
#pragma unroll
        for (int j = 0; j < kGramBlock; ++j) sums[i][j] += a[i] * b[j];
      }
    }
  }
  __syncthreads();
  double* gathered = stack;
  constexpr int kSums = kGramBlock * kGramBlock;
  if (slice < slices) {
#pragma unroll
    for (int i = 0; i < kSums; ++i) gathered[(slice * kSums + i) * pairs + pair] = sums[i / kGramBlock][i % kGramBlock];
  }
  __syncthreads();
  for (int i = threadIdx.x; i < pairs * kSums; i += kGramThreads) {
    double sum = 0.0;
    for (int s = 0; s < slices; ++s) sum += gathered[s * kSums * pairs + i];
    const int entry = i / pairs;
    block_pair(first_pair + i % pairs, blocks, &block_row, &block_column);
    const int64_t r = block_row * kGramBlock + entry / kGramBlock, c = block_column * kGramBlock + entry % kGramBlock;
    if (r <= c && c < size) partials[(slot_index(spans) * size + r) * size + c] = sum;
  }
}

}  // namespace carerl::cuda
