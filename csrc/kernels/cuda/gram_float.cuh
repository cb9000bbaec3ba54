// Gram matrix of [U; G] where fp64 is slow: GPUs for graphics have a 32nd or 64th of their fp32 rate for it. Sums are
// pairs of fp32 numbers, 48 bits together, for ten instructions a product.
//
// A block holds a tile of all rows in shared memory. A unit is eight rows times four rows and the work of a warp, whose
// lanes take columns; a lane has the 32 sums of its columns in registers. Range: every row is multiplied by a power of
// two that makes the largest number seen so far 1 to 2, and sums are multiplied when that grows.
#pragma once

#include "reduce.cuh"
#include "stage.cuh"

namespace carerl::cuda {

constexpr int kUnitRows = 8, kUnitColumns = 4, kUnitSums = kUnitRows * kUnitColumns;
constexpr int kFloatWarps = 6;  // two blocks of them leave the 168 registers that sums and tiles need

__host__ __device__ static inline int units_of(int size) {
  int units = 0;
  for (int fours = (size + 3) / 4; fours > 0; fours -= 2) units += fours;
  return units;
}

// Unit u: the eight of its rows, and the four of its columns, which does not end before the eight begins.
CARERL_DEVICE void unit_at(int u, int size, int* eight, int* four) {
  int row = 0;
  for (int fours = (size + 3) / 4; u >= fours; fours -= 2) u -= fours, ++row;
  *eight = row;
  *four = 2 * row + u;
}

// Bytes of shared memory: exponents of the rows and what they grew by, then the tile; afterwards the sums of warps.
__host__ __device__ static inline int64_t gram_float_bytes(int size, int tile) {
  const int64_t padded = (size + 7) / 8 * 8, rows = padded * (2 + tile) * 4, sums = kFloatWarps * kUnitSums * 8;
  return rows > sums ? rows : sums;
}

// sum + low += a b, all that fp32 loses of the product and of the sum going to `low` (Ogita, Rump and Oishi, Accurate
// sum and dot product, 2005). Intrinsics, or the compiler would fuse a product and a sum.
CARERL_DEVICE void add_product(float a, float b, float& sum, float& low) {
  const float product = __fmul_rn(a, b), lost = __fmaf_rn(a, b, -product);
  const float next = __fadd_rn(sum, product), part = __fsub_rn(next, sum);
  const float error = __fadd_rn(__fsub_rn(sum, __fsub_rn(next, part)), __fsub_rn(product, part));
  low = __fadd_rn(low, __fadd_rn(error, lost));
  sum = next;
}

// 2^exponent of a float whose biased exponent is given, 1 to 254.
CARERL_DEVICE float power_of_two(int biased) { return __uint_as_float(static_cast<uint32_t>(biased) << 23); }

// A row of a tile, made to have a largest number of 1 to 2 since the slot began, by a warp.
CARERL_DEVICE void scale_row(float* row, int tile, int lane, int* exponent, int* grown) {
  unsigned largest = 0;
  for (int x = lane; x < tile; x += 32) {
    const unsigned size = __float_as_uint(row[x]) & 0x7fffffffu;
    largest = size > largest ? size : largest;
  }
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) {
    const unsigned other = __shfl_xor_sync(kAllLanes, largest, offset);
    largest = other > largest ? other : largest;
  }
  const int before = *exponent, found = static_cast<int>(largest >> 23);
  const int now = found < before ? before : found > 253 ? 253 : found;  // non-finite numbers stay what they are
  __syncwarp();                                                         // every lane has read the one before
  if (lane == 0) *exponent = now, *grown = now - before;
  for (int x = lane; x < tile; x += 32) row[x] *= power_of_two(254 - now);
}

// partials [slots, size, size], upper triangle. A block has units [part * units, part * units + units) of a slot, and
// as many warps for each as fit, which take turns with the columns. Shared memory: see gram_float_bytes.
static __global__ void __launch_bounds__(32 * kFloatWarps, 2)
    gram_float_kernel(const __grid_constant__ Spans spans, const __grid_constant__ Basis basis, int tile, int parts,
                      int units, double* partials) {
  CARERL_SHARED(shared);
  const int rows = static_cast<int>(basis.rows), size = rows + spans.batch, padded = (size + 7) / 8 * 8;
  int *exponents = reinterpret_cast<int*>(shared), *grown = exponents + padded;
  float* stack = reinterpret_cast<float*>(grown + padded);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  const int slices = warps / units, slice = warp / units;
  const int unit = static_cast<int>(blockIdx.x) % parts * units + warp % units;
  const bool works = unit < units_of(size);
  int eight = 0, four = 0;
  if (works) unit_at(unit, size, &eight, &four);
  const int64_t index = spans.span[0].first_slot + blockIdx.x / parts;
  const Slot slot = find_slot(spans, index);

  for (int i = threadIdx.x; i < padded; i += blockDim.x) exponents[i] = 1, grown[i] = 0;
  for (int i = size * tile + threadIdx.x; i < padded * tile; i += blockDim.x) stack[i] = 0.0f;
  float sums[kUnitSums] = {}, low[kUnitSums] = {};
  for (int64_t begin = slot.begin; begin < slot.end; begin += tile) {
    const int n = static_cast<int>(min64(tile, slot.end - begin));
    __syncthreads();  // everybody is done with the tile before
    const auto put = [&](int row, int x, const float (&values)[4]) {
      *reinterpret_cast<float4*>(stack + row * tile + x) = make_float4(values[0], values[1], values[2], values[3]);
    };
    stage_basis(basis, slot.column + begin, n, tile, put);
    stage_gradients(spans, slot, begin, n, tile,
                    [&](int b, int x, const float (&values)[4]) { put(rows + b, x, values); });
    __syncthreads();
    for (int row = warp; row < size; row += warps)
      scale_row(stack + row * tile, tile, lane, exponents + row, grown + row);
    __syncthreads();
    if (!works) continue;
    const int *down = grown + eight * kUnitRows, *across = grown + four * kUnitColumns;
    int any = 0;
    for (int i = 0; i < kUnitRows; ++i) any |= down[i] | across[i % kUnitColumns];
    if (any != 0) {
#pragma unroll
      for (int i = 0; i < kUnitSums; ++i) {  // in two steps: each is a float
        const int left = down[i / kUnitColumns], right = across[i % kUnitColumns];
        const float l = power_of_two(127 - (left < 126 ? left : 126)),
                    r = power_of_two(127 - (right < 126 ? right : 126));
        sums[i] = sums[i] * l * r;
        low[i] = low[i] * l * r;
      }
    }
    const float *from_rows = stack + eight * kUnitRows * tile, *from_columns = stack + four * kUnitColumns * tile;
#pragma unroll 1
    for (int x = lane + 32 * slice; x < tile; x += 32 * slices) {
      float a[kUnitRows], b[kUnitColumns];
#pragma unroll
      for (int i = 0; i < kUnitRows; ++i) a[i] = from_rows[i * tile + x];
#pragma unroll
      for (int j = 0; j < kUnitColumns; ++j) b[j] = from_columns[j * tile + x];
#pragma unroll
      for (int i = 0; i < kUnitSums; ++i) add_product(a[i / kUnitColumns], b[i % kUnitColumns], sums[i], low[i]);
    }
#pragma unroll
    for (int i = 0; i < kUnitSums; ++i) {  // what `low` has come to goes over, or it would round as a long sum does
      const float next = __fadd_rn(sums[i], low[i]);
      low[i] = __fsub_rn(low[i], __fsub_rn(next, sums[i]));
      sums[i] = next;
    }
  }

  double totals[kUnitSums];
#pragma unroll
  for (int i = 0; i < kUnitSums; ++i) totals[i] = static_cast<double>(sums[i]) + static_cast<double>(low[i]);
  const int own = sum_over_warp(totals, lane);
  const int row = eight * kUnitRows + own / kUnitColumns, column = four * kUnitColumns + own % kUnitColumns;
  const bool wanted = works && slice == 0 && row <= column && column < size;
  const int exponent = wanted ? exponents[row] + exponents[column] - 2 * 127 : 0;
  __syncthreads();                                       // everybody is done with the tile and the exponents
  double* gathered = reinterpret_cast<double*>(shared);  // [warps, 32]
  gathered[warp * 32 + lane] = totals[0];
  __syncthreads();
  if (!wanted) return;
  double total = 0.0;
  for (int s = 0; s < slices; ++s) total += gathered[(s * units + warp) * 32 + lane];
  partials[(index * size + row) * size + column] = ldexp(total, exponent);
}

}  // namespace carerl::cuda
