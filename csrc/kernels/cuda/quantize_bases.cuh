// Block-scaled codes: scale = max|u| / 127 (fp8: / 448) over each block of a row, codes rounded to nearest even.
#pragma once

#include "storage.cuh"

namespace carerl::cuda {

// A thread owns 16 columns: 16 / (a power of two of them) or all 32 lanes of a warp share a block of a row and, where
// it is longer than 512, go through it twice. Blocks are numbered through all rows.
static __global__ void __launch_bounds__(256, 4)
    quantize_kernel(const __grid_constant__ Basis basis, int64_t block, DType to, uint8_t* codes, float* scales) {
  const int team = block >= 512 ? 32 : static_cast<int>(block / 16);
  const int64_t per_row = (basis.stride + block - 1) / block;
  const int64_t thread = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const int64_t index = thread / team, row = index / per_row, begin = index % per_row * block;
  const bool exists = index < basis.rows * per_row;  // threads without a block still take part in the shuffles
  const int64_t end = exists ? min64(begin + block, basis.stride) : begin;
  const int64_t first = begin + thread % team * 16;
  const float most = to == DType::kI8 ? 127.0f : 448.0f;
  with_gradient_type(basis.dtype, [&](auto type) {
    using E = decltype(type);
    const typename E::Type* from = static_cast<const typename E::Type*>(basis.data) + row * basis.stride;
    const bool aligned = rows_aligned(basis.data, basis.stride, sizeof(typename E::Type));
    uint32_t largest = 0;  // magnitudes order like their bits, NaN above all
    for (int64_t x = first; x < end; x += team * 16) {
      float values[16];
      load_values<E, 16>(from + x, end - x, aligned, values);
#pragma unroll
      for (int i = 0; i < 16; ++i) {
        const uint32_t magnitude = __float_as_uint(values[i]) & 0x7fffffffu;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    for (int offset = team / 2; offset > 0; offset /= 2) {
      const uint32_t other = __shfl_xor_sync(kAllLanes, largest, offset);
      largest = other > largest ? other : largest;
    }
    const float scale = __fdiv_rn(__uint_as_float(largest), most);
    if (exists && thread % team == 0) scales[index] = scale;
    const bool writes_aligned = rows_aligned(codes, basis.stride, 1);
    for (int64_t x = first; x < end; x += team * 16) {
      float values[16];
      load_values<E, 16>(from + x, end - x, aligned, values);
      store_values<F8, 16>(codes + row * basis.stride + x, end - x, writes_aligned, [&](int i) {
        float code = scale > 0.0f ? __fdiv_rn(values[i], scale) : 0.0f;
        code = code > most ? most : code < -most ? -most : code;  // subnormal scales are coarse
        if (code != code) code = 0.0f;                            // NaN: the scale says it
        if (to == DType::kF8) return F8::narrow(code);
        return static_cast<uint32_t>(static_cast<uint8_t>(static_cast<int8_t>((code + 12582912.0f) - 12582912.0f)));
      });
    }
  });
}

}  // namespace carerl::cuda
