// Block-scaled codes: scale = max|u| / 127 (fp8: / 448) over each block of a row, codes rounded to nearest even.
#pragma once

#include "tile.h"

namespace carerl::cpu::CARERL_ISA {

static void quantize(const void* row, DType dtype, int64_t length, int64_t block, DType to, uint8_t* codes,
                     float* scales) {
  const float most = to == DType::kI8 ? 127.0f : 448.0f;
  float values[kFold];
  const int64_t step = min64(block, kFold);
  for (int64_t begin = 0; begin < length; begin += block, ++scales) {
    const int64_t end = min64(begin + block, length);
    Word largest = {};  // magnitudes order like their bits, NaN above all
    for (int64_t i = begin; i < end; i += step) {
      load_gradient<F32>(at(row, dtype, i), dtype, values, min64(step, end - i));
      for (int64_t j = 0; j < min64(step, end - i); j += kWidth) {
        const Word magnitude = as_word(load(values + j)) & 0x7fffffff;
        largest = magnitude > largest ? magnitude : largest;
      }
    }
    uint32_t bits = 0;
    for (int lane = 0; lane < kWidth; ++lane) bits = largest[lane] > bits ? largest[lane] : bits;
    const float scale = as_float(splat_word(bits))[0] / most;
    *scales = scale;
    for (int64_t i = begin; i < end; i += step) {
      const int64_t n = min64(step, end - i);
      load_gradient<F32>(at(row, dtype, i), dtype, values, n);
      for (int64_t j = 0; j < n; ++j) {
        float code = scale > 0 ? values[j] / scale : 0.0f;
        code = code > most ? most : code < -most ? -most : code;  // subnormal scales are coarse
        if (code != code) code = 0.0f;                            // NaN: the scale says it
        codes[i + j] = to == DType::kF8 ? fp8_code(code)
                                        : static_cast<uint8_t>(static_cast<int8_t>(
                                              (code + 12582912.0f) - 12582912.0f));  // 1.5 * 2^23: nearest even
      }
    }
  }
}

}  // namespace carerl::cpu::CARERL_ISA
