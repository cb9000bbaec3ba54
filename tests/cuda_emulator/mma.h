// Tensor cores: what a warp multiplies, gathered from its lanes. Sums are exact and then truncated to fp32, the
// coarsest that hardware does. Meant to be included by the kernels under test.
#pragma once

#include "cuda_runtime.h"

namespace emulator {

// Every lane's operand. Lives until the warp comes together again, hence the second meeting in `with_operands`.
template <class T, class F>
void with_operands(int line, const T& own, const F& f) {
  const T* all[32];
  const uint64_t* brought = exchange(~0u, line, to_word(&own));
  for (int i = 0; i < 32; ++i) all[i] = from_word<const T*>(brought[i]);
  f(all);
  exchange(~0u, line, 0);
}

inline float truncated(double x) {
  const float nearest = static_cast<float>(x);
  return std::isfinite(nearest) && std::fabs(nearest) > std::fabs(x) ? std::nextafter(nearest, 0.0f) : nearest;
}

inline double tf32(unsigned bits) { return from_word<float>(bits & 0xffffe000u); }

inline void mma_tf32(float (&c)[4], const uint32_t (&a)[4], const uint32_t (&b)[2]) {
  struct Operands {
    uint32_t a[4], b[2];
  };
  const Operands own = {{a[0], a[1], a[2], a[3]}, {b[0], b[1]}};
  with_operands(__LINE__, own, [&](const Operands* const(&all)[32]) {
    const int g = lane() / 4, t = lane() % 4;
    for (int i = 0; i < 4; ++i) {
      const int half = i / 2, column = 2 * t + i % 2;
      double sum = c[i];
      for (int k = 0; k < 8; ++k) {
        sum += tf32(all[4 * g + k % 4]->a[half + k / 4 * 2]) * tf32(all[4 * column + k % 4]->b[k / 4]);
      }
      c[i] = truncated(sum);
    }
  });
}

}  // namespace emulator
