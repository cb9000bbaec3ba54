// Between the passes of dacsp_: classes from the raw coefficients, weights applied in the frame R c, all on the device.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

// y = R x for a row-major R [k, k], a warp per row.
template <class T>
CARERL_DEVICE void multiply_root(const T* root, const double* x, double* y, int k) {
  const int lane = threadIdx.x % 32;
  for (int row = threadIdx.x / 32; row < k; row += blockDim.x / 32) {
    double sum = 0.0;
    for (int j = lane; j < k; j += 32) sum += static_cast<double>(root[static_cast<int64_t>(row) * k + j]) * x[j];
#pragma unroll
    for (int offset = 16; offset > 0; offset /= 2) sum += __shfl_xor_sync(kAllLanes, sum, offset);
    if (lane == 0) y[row] = sum;
  }
}

CARERL_DEVICE void apply_root(const Rule& rule, int64_t group, const double* x, double* y, int k) {
  __syncthreads();
  if (rule.root == nullptr) {
    for (int i = threadIdx.x; i < k; i += blockDim.x) y[i] = x[i];
  } else {
    const int64_t offset = rule.root_per_group ? group * k * k : 0;
    if (rule.root_is_double)
      multiply_root(static_cast<const double*>(rule.root) + offset, x, y, k);
    else
      multiply_root(static_cast<const float*>(rule.root) + offset, x, y, k);
  }
  __syncthreads();
}

// One block per gradient: c [k] -> coefficients fp32, classes, mix (linalg.dacsp_core), and scale = 1. Shared memory:
// 2 k doubles.
static __global__ void __launch_bounds__(256)
    classify_kernel(const double* all, const __grid_constant__ Rule rule, int k, float* coefficients, int8_t* classes,
                    float* mix, float* scale) {
  CARERL_SHARED(shared);
  double *first = reinterpret_cast<double*>(shared), *second = first + k;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * k;
  const double* c = all + row;
  apply_root(rule, blockIdx.x, c, first, k);
  for (int i = threadIdx.x; i < k; i += blockDim.x) {
    // A weight tensor is fp32 and so is its difference to 1, as in the reference.
    const auto excess = [&](const Weights& w) {
      return w.rows ? static_cast<double>(w.rows[i] - 1.0f) : w.value - 1.0;
    };
    const double threshold = rule.threshold.rows ? static_cast<double>(rule.threshold.rows[i]) : rule.threshold.value;
    const bool positive = c[i] > threshold, negative = c[i] < -threshold;
    classes[row + i] = static_cast<int8_t>(positive - negative);
    coefficients[row + i] = static_cast<float>(c[i]);
    first[i] *= negative ? excess(rule.conflict) : positive ? excess(rule.aligned) : 0.0;
  }
  apply_root(rule, blockIdx.x, first, second, k);
  for (int i = threadIdx.x; i < k; i += blockDim.x) mix[row + i] = static_cast<float>(second[i]);
  if (threadIdx.x == 0) scale[blockIdx.x] = 1.0f;
}

}  // namespace carerl::cuda
