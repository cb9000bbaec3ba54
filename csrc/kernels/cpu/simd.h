// A vector of floats and how storage types become one. Included by exactly one translation unit per instruction set,
// inside its own namespace (CARERL_ISA), so that no two of them share a symbol.
#pragma once

#include "types.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

// Arithmetic is written over the vector types of GCC and Clang; only conversions need to know the instruction set.
// CARERL_VECTOR_BYTES may be given from outside to run the plain code at another width.
#ifndef CARERL_VECTOR_BYTES
#if defined(__AVX512F__) && defined(__AVX512BW__) && defined(__AVX512DQ__) && defined(__AVX512VL__)
#define CARERL_VECTOR_BYTES 64
#define CARERL_AVX512
#elif defined(__AVX2__) && defined(__FMA__) && defined(__F16C__)
#define CARERL_VECTOR_BYTES 32
#define CARERL_AVX2
#else
#define CARERL_VECTOR_BYTES 16  // SSE2 and NEON registers
#endif
#endif

#define CARERL_INLINE static inline __attribute__((always_inline))
// Names a loop of constant trip count over an array of vectors: fully unrolled, the array becomes registers.
#define CARERL_UNROLL _Pragma("GCC unroll 16")

namespace carerl::cpu::CARERL_ISA {

constexpr int kWidth = CARERL_VECTOR_BYTES / 4;  // floats in a vector
constexpr int kDoubles = kWidth / 2;

typedef float Float __attribute__((vector_size(CARERL_VECTOR_BYTES)));
typedef uint32_t Word __attribute__((vector_size(CARERL_VECTOR_BYTES)));
typedef int32_t Int __attribute__((vector_size(CARERL_VECTOR_BYTES)));
typedef double Double __attribute__((vector_size(CARERL_VECTOR_BYTES)));  // kWidth / 2 doubles
typedef uint16_t Half __attribute__((vector_size(CARERL_VECTOR_BYTES / 2)));
typedef int8_t Byte __attribute__((vector_size(CARERL_VECTOR_BYTES / 4)));
// Tensors are views with any offset: every access to them is unaligned.
typedef float LooseFloat __attribute__((vector_size(CARERL_VECTOR_BYTES), aligned(1), may_alias));
typedef double LooseDouble __attribute__((vector_size(CARERL_VECTOR_BYTES), aligned(1), may_alias));
typedef Word LooseWord __attribute__((aligned(1), may_alias));
typedef Half LooseHalf __attribute__((aligned(1), may_alias));
typedef Byte LooseByte __attribute__((aligned(1), may_alias));

CARERL_INLINE int64_t min64(int64_t a, int64_t b) { return a < b ? a : b; }
CARERL_INLINE int64_t round_up(int64_t n, int64_t to) { return (n + to - 1) / to * to; }

CARERL_INLINE Float splat(float x) { return x - Float{}; }  // x - 0 keeps the sign of zero and costs nothing
CARERL_INLINE Word splat_word(uint32_t x) { return Word{} + x; }
CARERL_INLINE Float as_float(Word x) { return (Float)x; }
CARERL_INLINE Word as_word(Float x) { return (Word)x; }
CARERL_INLINE Float load(const float* p) { return *reinterpret_cast<const LooseFloat*>(p); }
CARERL_INLINE void store(float* p, Float x) { *reinterpret_cast<LooseFloat*>(p) = x; }

// ------------------------------------------------------------------------------------------------ storage to float

struct F32 {
  using Type = float;
  CARERL_INLINE Float load(const float* p) { return CARERL_ISA::load(p); }
};

CARERL_INLINE Word load_half(const uint16_t* p) {
#if defined(CARERL_AVX512)
  return (Word)_mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CARERL_AVX2)
  return (Word)_mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseHalf*>(p), Word);
#endif
}

struct BF16 {
  using Type = uint16_t;
  CARERL_INLINE Float load(const uint16_t* p) { return as_float(load_half(p) << 16); }
};

struct F16 {
  using Type = uint16_t;
  CARERL_INLINE Float load(const uint16_t* p) {
#if defined(CARERL_AVX512)
    return (Float)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p)));
#elif defined(CARERL_AVX2)
    return (Float)_mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p)));
#else
    const Word half = load_half(p);
    const Word magnitude = (half & 0x7fff) << 13;
    // The exponent is 112 too small; a product moves it and makes subnormals normal. Infinity and NaN keep exponent
    // 255.
    const Word finite = as_word(as_float(magnitude) * 0x1p112f);
    const Word special = (Word)(magnitude >= splat_word(0x7c00u << 13)) & 0x7f800000u;
    return as_float(finite | special | (half & 0x8000) << 16);
#endif
  }
};

struct I8 {
  using Type = int8_t;
  CARERL_INLINE Float load(const int8_t* p) {
#if defined(CARERL_AVX512)
    return (Float)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))));
#elif defined(CARERL_AVX2)
    return (Float)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))));
#else
    return __builtin_convertvector(__builtin_convertvector(*reinterpret_cast<const LooseByte*>(p), Int), Float);
#endif
  }
};

// float8_e4m3fn: its sign, 4 bits of exponent and 3 of mantissa are the top of an fp16 whose exponent is 8 too small.
struct F8 {
  using Type = uint8_t;
  CARERL_INLINE Float load(const uint8_t* p) {
#if defined(CARERL_AVX512)
    const __m256i high =
        _mm256_slli_epi16(_mm256_cvtepu8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))), 8);
    const __m256i half = _mm256_and_si256(_mm256_srai_epi16(high, 1), _mm256_set1_epi16(static_cast<int16_t>(0xbfff)));
    return (Float)_mm512_cvtph_ps(half) * 256.0f;
#elif defined(CARERL_AVX2)
    const __m128i high = _mm_slli_epi16(_mm_cvtepu8_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i*>(p))), 8);
    const __m128i half = _mm_and_si128(_mm_srai_epi16(high, 1), _mm_set1_epi16(static_cast<int16_t>(0xbfff)));
    return (Float)_mm256_cvtph_ps(half) * 256.0f;
#else
    const Word code = (Word) __builtin_convertvector(*reinterpret_cast<const LooseByte*>(p), Int);
    return as_float(as_word(as_float((code & 0x7f) << 20) * 0x1p120f) | (code & 0x80) << 24);
#endif
  }
};

// ------------------------------------------------------------------------------------------------ float to storage

CARERL_INLINE void store_half(uint16_t* p, Word x) {
#if defined(CARERL_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16((__m512i)x));
#elif defined(CARERL_AVX2)
  const __m256i packed = _mm256_packus_epi32((__m256i)x, (__m256i)x);  // each half of the register packs its own four
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08)));
#else
  *reinterpret_cast<LooseHalf*>(p) = __builtin_convertvector(x, Half);
#endif
}

// To nearest, ties to even, like torch.
CARERL_INLINE void store_as(F32, float* p, Float x) { store(p, x); }

// bf16 in the upper half of each word; what is below is noise. A NaN whose payload reaches below the upper half must be
// replaced first: rounding could carry it into the sign.
CARERL_INLINE Word bf16_bits(Float x) { return as_word(x) + 0x7fff + ((as_word(x) >> 16) & 1); }

CARERL_INLINE Float without_payload(Float x) {
  const Word nan = (Word)(x != x);
  return as_float((as_word(x) & ~nan) | (nan & 0x7fc00000));
}

CARERL_INLINE void store_as(BF16, uint16_t* p, Float x) { store_half(p, bf16_bits(without_payload(x)) >> 16); }

#if !defined(CARERL_AVX512) && !defined(CARERL_AVX2)
CARERL_INLINE uint16_t half_bits(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint32_t sign = (bits >> 16) & 0x8000;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude > 0x7f800000) return sign | 0x7e00;   // NaN
  if (magnitude >= 0x477ff000) return sign | 0x7c00;  // 65520 and more round to infinity
  if (magnitude < 0x38800000) {  // below 2^-14: subnormal; adding 1/2 leaves its integer multiple of 2^-24
    float small;
    __builtin_memcpy(&small, &magnitude, 4);
    small += 0.5f;
    uint32_t shifted;
    __builtin_memcpy(&shifted, &small, 4);
    return sign | (shifted - 0x3f000000);
  }
  return sign | ((magnitude - 0x38000000 + 0xfff + ((magnitude >> 13) & 1)) >> 13);
}
#endif

CARERL_INLINE void store_as(F16, uint16_t* p, Float x) {
#if defined(CARERL_AVX512)
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph((__m512)x, 0));
#elif defined(CARERL_AVX2)
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph((__m256)x, 0));
#else
  for (int lane = 0; lane < kWidth; ++lane) p[lane] = half_bits(x[lane]);
#endif
}

// float8_e4m3fn of a finite number of at most 448.
CARERL_INLINE uint8_t fp8_code(float x) {
  uint32_t bits;
  __builtin_memcpy(&bits, &x, 4);
  const uint8_t sign = static_cast<uint8_t>(bits >> 24) & 0x80;
  const uint32_t magnitude = bits & 0x7fffffff;
  if (magnitude < 0x3c800000) {  // below 2^-6: subnormal; adding 2^14 leaves its integer multiple of 2^-9
    float small;
    __builtin_memcpy(&small, &magnitude, 4);
    small += 16384.0f;
    uint32_t shifted;
    __builtin_memcpy(&shifted, &small, 4);
    return sign | static_cast<uint8_t>(shifted - 0x46800000);
  }
  return sign | static_cast<uint8_t>(((magnitude + 0x7ffff + ((magnitude >> 20) & 1)) >> 20) - (120 << 3));
}

// --------------------------------------------------------------------------------------------------- groups of vectors

// Widening to floats in the order of memory costs shuffles across the register. Sums do not care about the order of
// their columns and edits are made column by column, so kernels work on groups of vectors in whatever order a storage
// type comes apart cheaply, and bring the gradients of a tile into the order of the bases once.
//   load:    a group as floats in that order
//   store:   the other way; a NaN has no payload below what E keeps
//   arrange: vectors in the order of memory into that order; restore: back
template <class E>
struct Group {
  static constexpr int kVectors = 1;
  CARERL_INLINE void load(const typename E::Type* p, Float* out) { out[0] = E::load(p); }
  CARERL_INLINE void store(typename E::Type* p, const Float* in) { store_as(E{}, p, in[0]); }
  CARERL_INLINE void arrange(Float*) {}
  CARERL_INLINE void restore(Float*) {}
};

#if defined(CARERL_AVX2) || defined(CARERL_AVX512)
// The even elements, and the odd ones: a shift and a mask.
template <>
struct Group<BF16> {
  static constexpr int kVectors = 2;
  CARERL_INLINE void load(const uint16_t* p, Float* out) {
    const Word both = *reinterpret_cast<const LooseWord*>(p);
    out[0] = as_float(both << 16);
    out[1] = as_float(both & 0xffff0000u);
  }
  CARERL_INLINE void store(uint16_t* p, const Float* in) {
    *reinterpret_cast<LooseWord*>(p) = (bf16_bits(in[0]) >> 16) | (bf16_bits(in[1]) & 0xffff0000u);
  }
#if defined(CARERL_AVX512)
  CARERL_INLINE void arrange(Float* x) {
    const __m512i even = _mm512_setr_epi32(0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30);
    const __m512 a = (__m512)x[0], b = (__m512)x[1];
    x[0] = (Float)_mm512_permutex2var_ps(a, even, b);
    x[1] = (Float)_mm512_permutex2var_ps(a, _mm512_add_epi32(even, _mm512_set1_epi32(1)), b);
  }
  CARERL_INLINE void restore(Float* x) {
    const __m512i first = _mm512_setr_epi32(0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
    const __m512 even = (__m512)x[0], odd = (__m512)x[1];
    x[0] = (Float)_mm512_permutex2var_ps(even, first, odd);
    x[1] = (Float)_mm512_permutex2var_ps(even, _mm512_add_epi32(first, _mm512_set1_epi32(8)), odd);
  }
#else
  CARERL_INLINE void arrange(Float* x) {
    const __m256 even = _mm256_shuffle_ps((__m256)x[0], (__m256)x[1], 0x88);  // quarters in the order a b a b
    const __m256 odd = _mm256_shuffle_ps((__m256)x[0], (__m256)x[1], 0xdd);
    x[0] = (Float)_mm256_permute4x64_pd(_mm256_castps_pd(even), 0xd8);
    x[1] = (Float)_mm256_permute4x64_pd(_mm256_castps_pd(odd), 0xd8);
  }
  CARERL_INLINE void restore(Float* x) {
    const __m256 low = _mm256_unpacklo_ps((__m256)x[0], (__m256)x[1]);
    const __m256 high = _mm256_unpackhi_ps((__m256)x[0], (__m256)x[1]);
    x[0] = (Float)_mm256_permute2f128_ps(low, high, 0x20);
    x[1] = (Float)_mm256_permute2f128_ps(low, high, 0x31);
  }
#endif
};
#endif

#if defined(CARERL_AVX2)
// 32 codes, in the order of memory: each eight widened on their way from memory, with no register for the shuffle.
template <>
struct Group<I8> {
  static constexpr int kVectors = 4;
  CARERL_INLINE void load(const int8_t* p, Float* out) {
    CARERL_UNROLL
    for (int j = 0; j < kVectors; ++j) out[j] = I8::load(p + j * kWidth);
  }
  CARERL_INLINE void arrange(Float*) {}
  CARERL_INLINE void restore(Float*) {}
};
#endif

template <class E>
constexpr int kVectors = Group<E>::kVectors;
template <class E>
constexpr int64_t kGroup = kVectors<E> * kWidth;  // elements of a group

// The first n elements of a group with zeros behind them, or the whole group. Reads nothing beyond.
template <class E>
CARERL_INLINE void load_group(const typename E::Type* p, int64_t n, Float* out) {
  if (n >= kGroup<E>) return Group<E>::load(p, out);
  typename E::Type padded[kGroup<E>] = {};
  __builtin_memcpy(padded, p, n * sizeof(*p));
  Group<E>::load(padded, out);
}

// The first n elements of a group, or the whole group.
template <class E>
CARERL_INLINE void store_group(typename E::Type* p, const Float* in, int64_t n) {
  if (n >= kGroup<E>) return Group<E>::store(p, in);
  typename E::Type padded[kGroup<E>];
  Group<E>::store(padded, in);
  __builtin_memcpy(p, padded, n * sizeof(*p));
}

// A group of the bases' type E out of gradients of another type G.
template <class E, class G>
CARERL_INLINE void load_arranged(const typename G::Type* p, int64_t n, Float* out) {
  if constexpr (__is_same(E, G)) return load_group<E>(p, n, out);
  typename G::Type padded[kGroup<E>];
  if (n < kGroup<E>) {
    __builtin_memset(padded, 0, sizeof(padded));
    __builtin_memcpy(padded, p, n * sizeof(*p));
    p = padded;
  }
  CARERL_UNROLL
  for (int v = 0; v < kVectors<E>; ++v) out[v] = G::load(p + v * kWidth);
  Group<E>::arrange(out);
}

template <class E, class G>
CARERL_INLINE void store_arranged(typename G::Type* p, Float* in, int64_t n) {
  if constexpr (__is_same(E, G)) {
    CARERL_UNROLL
    for (int v = 0; v < kVectors<E>; ++v) in[v] = __is_same(E, BF16) ? without_payload(in[v]) : in[v];
    return store_group<E>(p, in, n);
  }
  Group<E>::restore(in);
  typename G::Type padded[kGroup<E>];
  typename G::Type* to = n < kGroup<E> ? padded : p;
  CARERL_UNROLL
  for (int v = 0; v < kVectors<E>; ++v) store_as(G{}, to + v * kWidth, in[v]);
  if (n < kGroup<E>) __builtin_memcpy(p, padded, n * sizeof(*p));
}

// -------------------------------------------------------------------------------------------------------- fp64 totals

// lanes[0..kWidth) += x, each lane exactly widened.
CARERL_INLINE void fold(double* lanes, Float x) {
#if defined(CARERL_AVX512)
  const __m512d low = _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x));
  const __m512d high = _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1));
  _mm512_storeu_pd(lanes, _mm512_add_pd(_mm512_loadu_pd(lanes), low));
  _mm512_storeu_pd(lanes + 8, _mm512_add_pd(_mm512_loadu_pd(lanes + 8), high));
#elif defined(CARERL_AVX2)
  const __m256d low = _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x));
  const __m256d high = _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1));
  _mm256_storeu_pd(lanes, _mm256_add_pd(_mm256_loadu_pd(lanes), low));
  _mm256_storeu_pd(lanes + 4, _mm256_add_pd(_mm256_loadu_pd(lanes + 4), high));
#else
  for (int lane = 0; lane < kWidth; ++lane) lanes[lane] += x[lane];
#endif
}

// As many floats as a vector has doubles, exactly widened.
typedef float FloatPair __attribute__((vector_size(CARERL_VECTOR_BYTES / 2)));
typedef FloatPair LooseFloatPair __attribute__((aligned(1), may_alias));

CARERL_INLINE Double widen(const float* p) {
#if defined(CARERL_AVX512)
  return (Double)_mm512_cvtps_pd(_mm256_loadu_ps(p));
#elif defined(CARERL_AVX2)
  return (Double)_mm256_cvtps_pd(_mm_loadu_ps(p));  // of the general form GCC 12 makes four instructions
#else
  return __builtin_convertvector(*reinterpret_cast<const LooseFloatPair*>(p), Double);
#endif
}

CARERL_INLINE bool any(Word x) {
#if defined(CARERL_AVX512)
  return _mm512_test_epi32_mask((__m512i)x, (__m512i)x) != 0;
#elif defined(CARERL_AVX2)
  return !_mm256_testz_si256((__m256i)x, (__m256i)x);
#else
  uint32_t bits = 0;
  for (int lane = 0; lane < kWidth; ++lane) bits |= x[lane];
  return bits != 0;
#endif
}

CARERL_INLINE double sum(const double* lanes, int count) {
  double total = 0;
  for (int lane = 0; lane < count; ++lane) total += lanes[lane];
  return total;
}

// dst[0..kWidth) = x, in fp32 or fp64
CARERL_INLINE void put(float* dst, Float x) { store(dst, x); }
CARERL_INLINE void put(double* dst, Float x) {
#if defined(CARERL_AVX512)
  _mm512_storeu_pd(dst, _mm512_cvtps_pd(_mm512_castps512_ps256((__m512)x)));
  _mm512_storeu_pd(dst + 8, _mm512_cvtps_pd(_mm512_extractf32x8_ps((__m512)x, 1)));
#elif defined(CARERL_AVX2)
  _mm256_storeu_pd(dst, _mm256_cvtps_pd(_mm256_castps256_ps128((__m256)x)));
  _mm256_storeu_pd(dst + 4, _mm256_cvtps_pd(_mm256_extractf128_ps((__m256)x, 1)));
#else
  for (int lane = 0; lane < kWidth; ++lane) dst[lane] = x[lane];
#endif
}

}  // namespace carerl::cpu::CARERL_ISA
