// Storage types: 16 bytes of them at a time between memory and registers, and as floats in registers.
#pragma once

#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "types.h"

#define CARERL_DEVICE static __device__ __forceinline__
// All shared memory is dynamic: its size follows from K and B, and the host emulator of the tests can poison it.
#ifndef CARERL_SHARED
#define CARERL_SHARED(name) extern __shared__ __align__(16) unsigned char name[]
#endif
#ifndef CARERL_LAUNCH
#define CARERL_LAUNCH(kernel, grid, block, shared, stream, ...) kernel<<<grid, block, shared, stream>>>(__VA_ARGS__)
#endif

namespace carerl::cuda {

constexpr unsigned kAllLanes = 0xffffffffu;

// On sm_120 the compiler's schedules take more registers than elsewhere. Where they run out there, less is in flight.
#if defined(CARERL_FEW_REGISTERS) || (defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 1200)
constexpr bool kFewRegisters = true;
#else
constexpr bool kFewRegisters = false;
#endif

CARERL_DEVICE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CARERL_DEVICE bool is_finite(float x) { return x - x == 0.0f; }
CARERL_DEVICE int linear_thread() { return threadIdx.y * blockDim.x + threadIdx.x; }
CARERL_DEVICE int linear_threads() { return blockDim.x * blockDim.y; }

// Each type has: kWidth elements in 16 bytes, kScaled (one fp32 scale per block), the bits of an element, elements
// 4q to 4q + 3 of 16 bytes as floats (q is known once loops are unrolled), and a float rounded to nearest even.

CARERL_DEVICE uint32_t word(const uint4& raw, int i) {
  return i == 0 ? raw.x : i == 1 ? raw.y : i == 2 ? raw.z : raw.w;
}

struct F32 {
  using Type = float;
  static constexpr int kWidth = 4;
  static constexpr bool kScaled = false;
  CARERL_DEVICE uint32_t bits(float x) { return __float_as_uint(x); }
  CARERL_DEVICE void quad(const uint4& raw, int, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(word(raw, i));
  }
  CARERL_DEVICE uint32_t narrow(float x) { return __float_as_uint(x); }
};

struct BF16 {
  using Type = uint16_t;
  static constexpr int kWidth = 8;
  static constexpr int kDropped = 16;  // mantissa bits that fp32 has beyond
  static constexpr bool kScaled = false;
  CARERL_DEVICE uint32_t bits(uint16_t x) { return x; }
  CARERL_DEVICE void quad(const uint4& raw, int q, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = word(raw, 2 * q + i);
      out[2 * i] = __uint_as_float(pair << 16);
      out[2 * i + 1] = __uint_as_float(pair & 0xffff0000u);
    }
  }
  CARERL_DEVICE uint32_t narrow(float x) {
    const uint32_t b = __float_as_uint(x);
    return x != x ? 0x7fc0u : (b + 0x7fff + ((b >> 16) & 1)) >> 16;
  }
};

struct F16 {
  using Type = uint16_t;
  static constexpr int kWidth = 8;
  static constexpr int kDropped = 13;
  static constexpr bool kScaled = false;
  CARERL_DEVICE uint32_t bits(uint16_t x) { return x; }
  CARERL_DEVICE void quad(const uint4& raw, int q, float (&out)[4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t pair = word(raw, 2 * q + i);
      out[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
      out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
    }
  }
  CARERL_DEVICE uint32_t narrow(float x) { return __half_as_ushort(__float2half_rn(x)); }
};

struct I8 {
  using Type = int8_t;
  static constexpr int kWidth = 16;
  static constexpr bool kScaled = true;
  CARERL_DEVICE uint32_t bits(int8_t x) { return static_cast<uint8_t>(x); }
  // A byte in the mantissa of 2^23 and one subtraction: two instructions at full rate, where I2F runs at a quarter.
  CARERL_DEVICE void quad(const uint4& raw, int q, float (&out)[4]) {
    const uint32_t biased = word(raw, q) ^ 0x80808080u;
#pragma unroll
    for (int i = 0; i < 4; ++i) out[i] = __uint_as_float(__byte_perm(biased, 0x4b000000u, 0x7540 + i)) - 8388736.0f;
  }
};

// float8_e4m3fn: sign, four bits of exponent with bias 7, three of mantissa. Codes are finite (see _ops.py).
struct F8 {
  using Type = uint8_t;
  static constexpr int kWidth = 16;
  static constexpr bool kScaled = true;
  CARERL_DEVICE uint32_t bits(uint8_t x) { return x; }
  // From sm_89 on in hardware, two at a time to fp16, which holds them all. Else: moved into the fields of a float the
  // exponent is 120 too small, also below the normal range; a product repairs it.
  CARERL_DEVICE void quad(const uint4& raw, int q, float (&out)[4]) {
    const uint32_t packed = word(raw, q);
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 890
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t pair;
      asm("cvt.rn.f16x2.e4m3x2 %0, %1;" : "=r"(pair) : "h"(static_cast<uint16_t>(packed >> (16 * i))));
      out[2 * i] = __half2float(__ushort_as_half(static_cast<uint16_t>(pair)));
      out[2 * i + 1] = __half2float(__ushort_as_half(static_cast<uint16_t>(pair >> 16)));
    }
#else
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t moved = static_cast<uint32_t>(static_cast<int32_t>(packed << (24 - 8 * i)) >> 4) & 0x87f00000u;
      out[i] = __uint_as_float(moved) * 0x1p120f;
    }
#endif
  }
  // Of a finite number of at most 448.
  CARERL_DEVICE uint32_t narrow(float x) {
    const uint32_t b = __float_as_uint(x), sign = (b >> 24) & 0x80, size = b & 0x7fffffff;
    if (size < 0x3c800000u) {  // below 2^-6: subnormal; adding 2^14 leaves a multiple of 2^-9
      return sign | (__float_as_uint(__uint_as_float(size) + 16384.0f) - 0x46800000u);
    }
    return sign | ((size - 0x3c000000u + 0x7ffff + ((size >> 20) & 1)) >> 20);
  }
};

// f(E{}) for the type of a gradient, or of any basis. The branch is the same for a whole launch.
template <class F>
CARERL_DEVICE void with_gradient_type(DType dtype, const F& f) {
  if (dtype == DType::kF32) return f(F32{});
  if (dtype == DType::kBF16) return f(BF16{});
  f(F16{});
}
template <class F>
CARERL_DEVICE void with_basis_type(DType dtype, const F& f) {
  if (dtype == DType::kI8) return f(I8{});
  if (dtype == DType::kF8) return f(F8{});
  with_gradient_type(dtype, f);
}

// Whether rows of these elements, `stride` apart, all begin at a multiple of 16 bytes. Columns of pieces do: they are
// multiples of 16. Where it fails (N odd, say), elements are read one by one, at a fraction of the bandwidth.
CARERL_DEVICE bool rows_aligned(const void* data, int64_t stride, int size) {
  return ((reinterpret_cast<uintptr_t>(data) | static_cast<uintptr_t>(stride * size)) & 15) == 0;
}

// The first n elements of 16 bytes at any address, and zeros. A loop, not unrolled: there are many of these in a
// kernel.
template <class E>
CARERL_DEVICE uint4 gather(const typename E::Type* p, int n) {
  constexpr int kBits = 8 * sizeof(typename E::Type);
  uint64_t low = 0, high = 0;
#pragma unroll 1
  for (int i = n - 1; i >= 0; --i) {
    high = high << kBits | low >> (64 - kBits);
    low = low << kBits | E::bits(p[i]);
  }
  return make_uint4(static_cast<uint32_t>(low), static_cast<uint32_t>(low >> 32), static_cast<uint32_t>(high),
                    static_cast<uint32_t>(high >> 32));
}

template <class E>
CARERL_DEVICE uint4 load_aligned(const typename E::Type* p) {
  return *reinterpret_cast<const uint4*>(p);
}

// 16 bytes of which the first n elements exist (n may be negative), zeros behind them.
template <class E>
CARERL_DEVICE uint4 load(const typename E::Type* p, int64_t n, bool aligned) {
  if (aligned && n >= E::kWidth) return load_aligned<E>(p);
  return gather<E>(p, static_cast<int>(min64(n, E::kWidth)));
}

// W floats of a gradient, zeros beyond n.
template <class E, int W>
CARERL_DEVICE void load_values(const typename E::Type* p, int64_t n, bool aligned, float (&values)[W]) {
  if constexpr (W < E::kWidth) {  // four elements of a 16-bit type: 8 bytes
    uint4 raw = make_uint4(0, 0, 0, 0);
    if (aligned && n >= W) {
      const uint2 half = *reinterpret_cast<const uint2*>(p);
      raw.x = half.x, raw.y = half.y;
    } else {
      raw = gather<E>(p, static_cast<int>(min64(n, W)));
    }
    E::quad(raw, 0, values);
  } else {
#pragma unroll
    for (int v = 0; v < W / E::kWidth; ++v) {
      const uint4 raw = load<E>(p + v * E::kWidth, n - v * E::kWidth, aligned);
#pragma unroll
      for (int q = 0; q < E::kWidth / 4; ++q) {
        float four[4];
        E::quad(raw, q, four);
#pragma unroll
        for (int i = 0; i < 4; ++i) values[v * E::kWidth + 4 * q + i] = four[i];
      }
    }
  }
}

// W floats to storage by `round`, which gives the bits of element i; at most n. Streaming: nobody reads them soon.
template <class E, int W, class Round>
CARERL_DEVICE void store_values(typename E::Type* p, int64_t n, bool aligned, const Round& round) {
  constexpr int kWords = W * sizeof(typename E::Type) / 4, kPerWord = 4 / sizeof(typename E::Type);
  uint32_t words[kWords];
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) words[w] |= round(w * kPerWord + i) << (32 / kPerWord * i % 32);
  }
  if (aligned && n >= W) {
    if constexpr (kWords == 2) {
      __stcs(reinterpret_cast<uint2*>(p), make_uint2(words[0], words[1]));
    } else {
#pragma unroll
      for (int v = 0; v < kWords / 4; ++v) {
        __stcs(reinterpret_cast<uint4*>(p) + v,
               make_uint4(words[4 * v], words[4 * v + 1], words[4 * v + 2], words[4 * v + 3]));
      }
    }
    return;
  }
#pragma unroll
  for (int i = 0; i < W; ++i) {
    if (i >= n) continue;
    if constexpr (kPerWord == 1) {
      p[i] = __uint_as_float(words[i]);
    } else {
      p[i] = static_cast<typename E::Type>(words[i / kPerWord] >> (32 / kPerWord * (i % kPerWord)));
    }
  }
}

// The scale of the block that a column lies in; 16 elements from a multiple of 16 on share theirs.
template <class E>
CARERL_DEVICE float scale_at(const Basis& basis, int64_t row, int64_t column) {
  if constexpr (E::kScaled) return basis.scales[row * basis.blocks + (column >> basis.block_shift)];
  return 1.0f;
}

// Stretch [begin, end) of one span, and which set of per-tensor arguments it takes.
struct Slot {
  char* grads;  // of the span, first gradient
  int64_t column, begin, end;
  int group;
};

CARERL_DEVICE Slot find_slot(const Spans& spans, int64_t index) {
  int low = 0, high = spans.count;  // the last span whose first slot is not beyond; empty ones have no slots
  while (high - low > 1) {
    const int middle = (low + high) / 2;
    if (spans.span[middle].first_slot <= index)
      low = middle;
    else
      high = middle;
  }
  const Span& span = spans.span[low];
  const int64_t begin = (index - span.first_slot) * spans.slot;
  return {static_cast<char*>(span.grads), span.column, begin, min64(begin + spans.slot, span.length),
          spans.first_group < 0 ? 0 : spans.first_group + low};
}

CARERL_DEVICE int64_t slot_index(const Spans& spans) { return spans.span[0].first_slot + blockIdx.x; }
// From the last slot to the first, for the second of two passes: the cache still has the end of the first one.
CARERL_DEVICE int64_t slot_from_the_end(const Spans& spans) {
  return spans.span[0].first_slot + gridDim.x - 1 - blockIdx.x;
}

template <class E>
CARERL_DEVICE typename E::Type* gradient(const Spans& spans, const Slot& slot, int b, int64_t at) {
  return reinterpret_cast<typename E::Type*>(slot.grads) + b * spans.stride + at;
}

template <class E>
CARERL_DEVICE bool gradients_aligned(const Spans& spans, const Slot& slot) {
  return rows_aligned(slot.grads, spans.batch > 1 ? spans.stride : 0, sizeof(typename E::Type));
}

}  // namespace carerl::cuda
