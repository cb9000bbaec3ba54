// Gram matrix of [U; G]. Products are taken and added in fp64, where those of fp32 numbers are exact: streaming PCA
// divides by eigenvalues down to 1e-6 of this matrix. In tensor cores, which data-centre GPUs have for it (H100: 67
// Tflop/s, K + B = 25 rows of bf16 take half as long as reading them); for GPUs without it see gram_float.cuh.
//
// A block holds a tile of all rows in shared memory as floats. Rows are taken eight at a time, up to four of these
// eights make a side, and a warp has the sums of one pair of sides. Eight rows of four columns are operands of either
// side as they are; the pitch spreads them over all banks.
#pragma once

#include "mma.cuh"
#include "stage.cuh"

namespace carerl::cuda {

constexpr int kGramEights = 3;  // of rows, on a side at most
constexpr int kGramWarps = 8;

// The sides of a matrix of `size` rows, as even as they can be: eights of each, sides, and pairs of sides.
struct Sides {
  int eights, sides, pairs;
};
__host__ __device__ static inline Sides sides_of(int size) {
  const int eights = (size + 7) / 8, sides = (eights + kGramEights - 1) / kGramEights;
  const int each = (eights + sides - 1) / sides, count = (eights + each - 1) / each;
  return {each, count, count * (count + 1) / 2};
}

// Pair p of the sides (i, j) with i <= j.
CARERL_DEVICE void side_pair(int p, int sides, int* i, int* j) {
  int row = 0;
  while (p >= sides - row) p -= sides - row++;
  *i = row;
  *j = row + p;
}

// partials [slots, size, size], upper triangle. Shared memory: the tile [rows of all sides, tile + 4], whose columns
// are a power of two; afterwards 8 x 8 sums of every warp. A block has `pairs` pairs of sides from blockIdx.y * pairs
// on, and as many warps for each as fit, which take turns with the columns.
static __global__ void __launch_bounds__(32 * kGramWarps, 2)
    gram_kernel(const __grid_constant__ Spans spans, const __grid_constant__ Basis basis, int tile, int pairs,
                double* partials) {
  CARERL_SHARED(shared);
  float* stack = reinterpret_cast<float*>(shared);
  const int rows = static_cast<int>(basis.rows), size = rows + spans.batch, pitch = tile + 4;
  const Sides shape = sides_of(size);
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int slices = blockDim.x / 32 / pairs, slice = warp / pairs, pair = blockIdx.y * pairs + warp % pairs;
  const bool works = pair < shape.pairs;
  int left = 0, right = 0;
  if (works) side_pair(pair, shape.sides, &left, &right);
  const Slot slot = find_slot(spans, slot_index(spans));

  const int all_rows = shape.sides * shape.eights * 8;
  for (int i = size * pitch + threadIdx.x; i < all_rows * pitch; i += blockDim.x) stack[i] = 0.0f;
  double sums[kGramEights][kGramEights][2] = {};
  for (int64_t begin = slot.begin; begin < slot.end; begin += tile) {
    const int n = static_cast<int>(min64(tile, slot.end - begin));
    __syncthreads();  // everybody is done with the tile before
    const auto put = [&](int row, int x, const float (&four)[4]) {
      *reinterpret_cast<float4*>(stack + row * pitch + halved(x, tile)) =
          make_float4(four[0], four[1], four[2], four[3]);
    };
    stage_basis(basis, slot.column + begin, n, tile, put);
    stage_gradients(spans, slot, begin, n, tile, [&](int b, int x, const float (&four)[4]) { put(rows + b, x, four); });
    __syncthreads();
    if (!works) continue;
    const float* from_left = stack + (left * shape.eights * 8 + g) * pitch + t;
    const float* from_right = stack + (right * shape.eights * 8 + g) * pitch + t;
    for (int x = 4 * slice; x < tile; x += 4 * slices) {
      double a[kGramEights], b[kGramEights];
#pragma unroll
      for (int i = 0; i < kGramEights; ++i) {
        if (i >= shape.eights) break;
        a[i] = from_left[8 * i * pitch + x];
        b[i] = left == right ? a[i] : from_right[8 * i * pitch + x];
      }
#pragma unroll
      for (int i = 0; i < kGramEights; ++i) {
        if (i >= shape.eights) break;
#pragma unroll
        for (int j = 0; j < kGramEights; ++j) {
          if (j >= shape.eights) break;
          if (j >= i || left != right) mma_double(sums[i][j], a[i], b[j]);
        }
      }
    }
  }
  double* gathered = reinterpret_cast<double*>(shared);  // [warps, 64]
#pragma unroll
  for (int i = 0; i < kGramEights; ++i) {
#pragma unroll
    for (int j = 0; j < kGramEights; ++j) {
      if (i >= shape.eights || j >= shape.eights) continue;
      __syncthreads();  // everybody is done with the tile, or with the sums before
#pragma unroll
      for (int c = 0; c < 2; ++c) gathered[warp * 64 + 8 * g + 2 * t + c] = sums[i][j][c];
      __syncthreads();
      if (slice != 0 || !works) continue;
      for (int e = lane; e < 64; e += 32) {
        double sum = 0.0;
        for (int s = 0; s < slices; ++s) sum += gathered[(s * pairs + warp) * 64 + e];
        const int64_t r = (left * shape.eights + i) * 8 + e / 8, c = (right * shape.eights + j) * 8 + e % 8;
        if (r <= c && c < size) partials[(slot_index(spans) * size + r) * size + c] = sum;
      }
    }
  }
}

}  // namespace carerl::cuda
