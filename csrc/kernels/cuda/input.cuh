// One-sided directions of weight matrices: coefficients W V^T, and W <- W + x V with x a function of the coefficients
// of each output.
//
// A block takes 64 outputs of a matrix, a warp 16 of them, and goes over tiles of 32 inputs: once for the coefficients,
// and backwards, where the cache still has the end of the first pass, to add what they came to. Coefficients stay in
// the registers in which the first product leaves them, and these are the operands of the second. With 96 directions
// there are 100 operations for a byte, five times what fp32 cores do while memory moves it. Hence tensor cores, in
// tf32: it holds what 16 bits store, and fp32 as the sum of two terms. A tile's products are added up there, tiles in
// fp32.
#pragma once

#include "mma.cuh"
#include "strip.cuh"

namespace carerl::cuda {

// What a coefficient moves by; `broken` where it may not move its output.
CARERL_DEVICE float correction(const InputRule& rule, float c, int64_t at, int64_t direction, bool* broken) {
  float x;
  if (rule.anchor != nullptr) {
    const float d = rule.anchor[at] - c;
    const float over = rule.upper == nullptr ? d : d - rule.upper[at];
    const float under = rule.lower == nullptr ? d : d + rule.lower[at];
    x = (over > 0.0f ? over : 0.0f) + (under < 0.0f ? under : 0.0f);
    *broken |= !is_finite(d) || over != over || under != under;
  } else {
    const auto gain = [&](const InputWeight& w) { return w.rows ? w.rows[direction] - 1.0f : w.value; };
    const float threshold = rule.threshold.rows ? rule.threshold.rows[direction] : rule.threshold.value;
    x = c > threshold ? gain(rule.aligned) * c : c < -threshold ? gain(rule.conflict) * c : 0.0f;
    *broken |= !is_finite(c);
  }
  *broken |= !is_finite(x);
  return x;
}

// Without a rule's numbers to go by, `coefficients` [matrices, outputs, K] are the result. Else partials [matrices,
// strips]: the sum of x^2. More than kGroups * kDirections directions are done in blocks, whose x lie in `kept`
// [blocks of the grid, warps, blocks, 64 kGroups / 4, 32] in between. Shared memory: see input_shared.
template <int kTerms, int kDirectionTerms, int kGroups>
__global__ void __launch_bounds__(kInputThreads, 2)
    input_kernel(const __grid_constant__ Matrices matrices, const __grid_constant__ InputRule rule, float* coefficients,
                 double* partials, float* kept) {
  using D = std::conditional_t<kDirectionTerms == 2, F32, BF16>;
  constexpr int kAll = kGroups * kDirections, kSums = kAll / 8;
  constexpr int kRows = kAll * kDepth / D::kWidth / kInputThreads;           // vectors of directions a thread carries
  constexpr bool kCarries = !(kFewRegisters && kTerms == 2 && kGroups > 1);  // else it reads them when they are due
  CARERL_SHARED(shared);
  double* energies = reinterpret_cast<double*>(shared);
  float* v = reinterpret_cast<float*>(energies + kInputWarps);
  float* w = v + kAll * kDepthPitch;
  int* moved = reinterpret_cast<int*>(shared + input_shared(kGroups)) - kStrip;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
  const int64_t outputs = matrices.outputs, inputs = matrices.inputs, K = matrices.count;
  const int64_t columns = matrices.left ? outputs : inputs;
  const int64_t strips = (outputs + kStrip - 1) / kStrip;
  const int64_t tiles = inputs > 0 ? (inputs + kDepth - 1) / kDepth : 1;  // never none: outputs of no inputs move, too
  const int blocks = static_cast<int>((K + kAll - 1) / kAll);
  if (kept != nullptr)
    kept += (static_cast<int64_t>(blockIdx.x) * kInputWarps + warp) * blocks * (kSums * 4 * 32) + lane;

  for (int64_t unit = blockIdx.x; unit < strips * matrices.matrices; unit += gridDim.x) {
    const int64_t matrix = unit / strips, first = unit % strips * kStrip, number = matrices.first + matrix;
    using Type = typename Strip<kTerms>::Type;
    Type* data = static_cast<Type*>(matrices.matrix[matrix]);
    const Strip<kTerms> strip = {data + (matrices.left ? first : first * columns),
                                 columns,
                                 inputs,
                                 min64(kStrip, outputs - first),
                                 matrices.left,
                                 rows_aligned(data, columns, sizeof(Type)),
                                 matrices.dtype == DType::kF16};
    const typename D::Type* own = static_cast<const typename D::Type*>(matrices.directions) + number * K * inputs;
    const bool aligned = rows_aligned(own, inputs, sizeof(typename D::Type));
    const auto fetch_directions = [&](int block, int64_t input, uint4(&raw)[kRows]) {
      fetch<D, kDepth>(own + static_cast<int64_t>(block) * kAll * inputs + input, inputs, K - block * kAll,
                       inputs - input, aligned, raw);
    };
    const auto groups_of = [&](int block) {
      const int64_t rest = K - block * kAll;
      return rest >= kAll ? kGroups : static_cast<int>((rest + kDirections - 1) / kDirections);
    };
    const bool works = 16 * warp < strip.there;
    uint4 next[Strip<kTerms>::kVectors], next_rows[kRows];
    float x[kSums][4];
    bool broken[2] = {false, false}, moves[2] = {false, false};  // of rows g and g + 8
    double energy[2] = {0.0, 0.0};

    for (int block = 0; block < blocks; ++block) {
      const int groups = groups_of(block);
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) x[j][i] = 0.0f;
      }
      strip.fetch(0, next);
      if (kCarries) fetch_directions(block, 0, next_rows);
      for (int64_t tile = 0; tile < tiles; ++tile) {
        __syncthreads();  // everybody is done with the tile before
        strip.put(next, w);
        if (!kCarries) fetch_directions(block, tile * kDepth, next_rows);
        put<D, kDepth>(next_rows, v, kDepthPitch);
        __syncthreads();
        if (tile + 1 < tiles) {
          strip.fetch((tile + 1) * kDepth, next);
          if (kCarries) fetch_directions(block, (tile + 1) * kDepth, next_rows);
        }
        if (!works) continue;
        uint32_t a[kDepth / 8][kTerms][4];
#pragma unroll
        for (int step = 0; step < kDepth / 8; ++step) {
          float from[4];
#pragma unroll
          for (int i = 0; i < 4; ++i) from[i] = w[strip.place(16 * warp + g + i % 2 * 8, 8 * step + t + i / 2 * 4)];
          split(from, a[step]);
        }
#pragma unroll
        for (int group = 0; group < kGroups; ++group) {
          if (group >= groups) break;
          float sums[4][4] = {};
#pragma unroll
          for (int step = 0; step < kDepth / 8; ++step) {
#pragma unroll
            for (int j = 0; j < 4; ++j) {
              const float* from = v + (group * kDirections + 8 * j + g) * kDepthPitch + 8 * step + t;
              const float pair[2] = {from[0], from[4]};
              uint32_t b[kDirectionTerms][2];
              split(pair, b);
              multiply(sums[j], a[step], b);
            }
          }
#pragma unroll
          for (int j = 0; j < 4; ++j) {
#pragma unroll
            for (int i = 0; i < 4; ++i) x[4 * group + j][i] += sums[j][i];
          }
        }
      }
#pragma unroll
      for (int j = 0; j < kSums; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const int64_t output = first + 16 * warp + g + i / 2 * 8, direction = block * kAll + 8 * j + 2 * t + i % 2;
          const bool exists = output < outputs && direction < K;
          const int64_t at = (number * outputs + output) * K + direction;
          if (coefficients != nullptr) {
            if (exists) coefficients[at] = x[j][i];
            continue;
          }
          x[j][i] = exists ? correction(rule, x[j][i], at, direction, &broken[i / 2]) : 0.0f;
          moves[i / 2] |= x[j][i] != 0.0f;
          energy[i / 2] += static_cast<double>(x[j][i]) * x[j][i];
        }
      }
      if (coefficients == nullptr && blocks > 1) {
#pragma unroll
        for (int j = 0; j < kSums * 4; ++j) kept[(block * kSums * 4 + j) * 32] = x[j / 4][j % 4];
      }
    }
    if (coefficients != nullptr) continue;

    double total = 0.0;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      const unsigned row = 15u << (4 * g);
      const bool whole = (__ballot_sync(kAllLanes, broken[half]) & row) == 0;
      const bool some = (__ballot_sync(kAllLanes, moves[half]) & row) != 0;
      if (t == 0) moved[16 * warp + g + 8 * half] = whole && some;
      total += whole && some ? energy[half] : 0.0;
    }
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) total += __shfl_xor_sync(kAllLanes, total, offset);
    if (lane == 0) energies[warp] = total;
    __syncthreads();
    if (threadIdx.x == 0) {
      for (int i = 1; i < kInputWarps; ++i) total += energies[i];
      partials[number * strips + unit % strips] = total;
    }
    const bool any = __any_sync(kAllLanes, (moved[lane] | moved[lane + 32]) != 0);

    const int64_t steps = any ? tiles * blocks : 0;  // tiles from the last to the first, the blocks of each
    const auto input_of = [&](int64_t step) { return (tiles - 1 - step / blocks) * kDepth; };
    const auto fetch_step = [&](int64_t step) {
      if (step % blocks == 0) strip.fetch(input_of(step), next);
      if (kCarries) fetch_directions(static_cast<int>(step % blocks), input_of(step), next_rows);
    };
    float sums[kDepth / 8][4];
    if (steps > 0) fetch_step(0);
    for (int64_t step = 0; step < steps; ++step) {
      const int block = static_cast<int>(step % blocks), groups = groups_of(block);
      __syncthreads();  // everybody is done with the tile and the directions before
      if (block == 0) strip.put(next, w);
      if (!kCarries) fetch_directions(block, input_of(step), next_rows);
      put<D, kDepth>(next_rows, v, kDepthPitch);
      __syncthreads();
      if (step + 1 < steps) fetch_step(step + 1);
      if (blocks > 1) {
#pragma unroll
        for (int j = 0; j < kSums * 4; ++j) x[j / 4][j % 4] = kept[(block * kSums * 4 + j) * 32];
      }
      if (block == 0) {
#pragma unroll
        for (int j = 0; j < kDepth / 8; ++j) {
#pragma unroll
          for (int i = 0; i < 4; ++i) sums[j][i] = 0.0f;
        }
      }
#pragma unroll
      for (int k = 0; k < kSums; ++k) {
        if (k / 4 >= groups || !works) break;
        // Direction 2t of eight stands for row t of the operands and 2t + 1 for row t + 4: so x is one already.
        const float from[4] = {x[k][0], x[k][2], x[k][1], x[k][3]};
        uint32_t a[2][4];
        split(from, a);
#pragma unroll
        for (int j = 0; j < kDepth / 8; ++j) {
          const float* row = v + (8 * k + 2 * t) * kDepthPitch + 8 * j + g;
          const float pair[2] = {row[0], row[kDepthPitch]};
          uint32_t b[kDirectionTerms][2];
          split(pair, b);
          multiply(sums[j], a, b);
        }
      }
      if (block + 1 < blocks) continue;
#pragma unroll
      for (int j = 0; j < kDepth / 8; ++j) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          w[strip.place(16 * warp + g + i / 2 * 8, 8 * j + 2 * t + i % 2)] += sums[j][i];
        }
      }
      __syncthreads();
      strip.store(input_of(step), w, moved);
    }
  }
}

// energies [matrices]: sums of the strips of each, one warp a matrix.
static __global__ void __launch_bounds__(32)
    input_energy_kernel(const double* partials, int64_t strips, double* energies) {
  const int64_t matrix = blockIdx.x;
  double sum = 0.0;
  for (int64_t i = threadIdx.x; i < strips; i += 32) sum += partials[matrix * strips + i];
#pragma unroll
  for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
  if (threadIdx.x == 0) energies[matrix] = sum;
}

}  // namespace carerl::cuda
