// Tiles: short stretches of rows as floats in L1, and back to storage.
#pragma once

#include "simd.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kRows = 4;         // rows of the bases read side by side; one stream is 30 % slower, eight are not faster
constexpr int64_t kTile = 2048;  // elements of a tile that is gone through several times: 8 KiB of floats in L1
constexpr int64_t kFold = 512;   // elements summed in fp32 before the lanes go to fp64 totals
constexpr int64_t kMaxBatch = 16;  // gradients handled together; more are done in turns, each reading the bases again

// Elements of a row that passes 1 and 2 read before they go to the next rows. The longer, the rarer the memory system
// has to find a new stream: 64 KiB of fp32 read 15 % faster than 8 KiB, 16 KiB of bf16 30 % faster than 4. Several
// gradients share the room, 64 KiB of L2, since they are kept as floats.
static int64_t tile_length(const Basis& basis, int64_t batch) {
  int64_t length = basis.dtype == DType::kF32 ? 16384 : 8192;
  for (int64_t b = 1; b < batch && length > kTile / 2; b *= 2) length /= 2;
  return length;
}

CARERL_INLINE const void* at(const void* data, DType dtype, int64_t element) {
  return static_cast<const char*>(data) + element * element_size(dtype);
}
CARERL_INLINE void* at(void* data, DType dtype, int64_t element) {
  return static_cast<char*>(data) + element * element_size(dtype);
}
// Gradient b of a span, from its element `begin` on.
CARERL_INLINE void* gradient(const Span& span, int64_t b, int64_t begin) {
  return at(span.grads, span.dtype, b * span.stride + begin);
}
template <class E>
CARERL_INLINE typename E::Type* element(const Basis& basis, int64_t row, int64_t column) {
  return static_cast<typename E::Type*>(basis.data) + row * basis.stride + column;
}
CARERL_INLINE const float* scale_row(const Basis& basis, int64_t row) { return basis.scales + row * basis.blocks; }
CARERL_INLINE bool is_scaled(const Basis& basis) { return basis.dtype >= DType::kI8; }
// End of the run of one scale: the block border after `column`, or `end`.
CARERL_INLINE int64_t run_end(const Basis& basis, int64_t column, int64_t end) {
  return min64(end, ((column >> basis.block_shift) + 1) << basis.block_shift);
}

template <class E>
static void widen_row(const typename E::Type* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(dst + i, E::load(src + i));
  if (i < n) store(dst + i, load_part<E>(src + i, n - i));
}

// R rows side by side.
template <class E, int R>
static void widen_rows(const typename E::Type* src, int64_t stride, float* dst, int64_t pitch, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) {
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) store(dst + r * pitch + i, E::load(src + r * stride + i));
  }
  for (int r = 0; i < n && r < R; ++r) store(dst + r * pitch + i, load_part<E>(src + r * stride + i, n - i));
}

// n floats of a gradient, and zeros up to the next multiple of kWidth.
static void load_tile(const void* src, DType dtype, float* dst, int64_t n) {
  switch (dtype) {
    case DType::kF32:
      return widen_row<F32>(static_cast<const float*>(src), dst, n);
    case DType::kBF16:
      return widen_row<BF16>(static_cast<const uint16_t*>(src), dst, n);
    case DType::kF16:
      return widen_row<F16>(static_cast<const uint16_t*>(src), dst, n);
    case DType::kI8:
    case DType::kF8:
      return;
  }
}

template <class E>
static void load_scaled(const Basis& basis, int64_t row, int64_t column, float* dst, int64_t n) {
  const typename E::Type* src = element<E>(basis, row, column);
  for (int64_t i = 0; i < n;) {
    const int64_t end = run_end(basis, column + i, column + n) - column;
    const Float scale = splat(scale_row(basis, row)[(column + i) >> basis.block_shift]);
    for (; i + kWidth <= end; i += kWidth) store(dst + i, E::load(src + i) * scale);
    if (i < end) store(dst + i, load_part<E>(src + i, end - i) * scale);
    i = end;
  }
}

// A row of the bases, as load_tile has it.
static void load_basis(const Basis& basis, int64_t row, int64_t column, float* dst, int64_t n) {
  if (basis.dtype == DType::kI8) return load_scaled<I8>(basis, row, column, dst, n);
  if (basis.dtype == DType::kF8) return load_scaled<F8>(basis, row, column, dst, n);
  load_tile(at(basis.data, basis.dtype, row * basis.stride + column), basis.dtype, dst, n);
}

// All rows of float bases, or those with scales one by one.
static void load_basis_rows(const Basis& basis, int64_t column, float* dst, int64_t pitch, int64_t n) {
  int64_t row = 0;
  for (; !is_scaled(basis) && row + kRows <= basis.rows; row += kRows) {
    float* to = dst + row * pitch;
    switch (basis.dtype) {
      case DType::kF32:
        widen_rows<F32, kRows>(element<F32>(basis, row, column), basis.stride, to, pitch, n);
        break;
      case DType::kBF16:
        widen_rows<BF16, kRows>(element<BF16>(basis, row, column), basis.stride, to, pitch, n);
        break;
      case DType::kF16:
        widen_rows<F16, kRows>(element<F16>(basis, row, column), basis.stride, to, pitch, n);
        break;
      case DType::kI8:
      case DType::kF8:
        break;
    }
  }
  for (; row < basis.rows; ++row) load_basis(basis, row, column, dst + row * pitch, n);
}

// Rows [U; G] of a span from `begin` on.
static void load_stack(const Basis& basis, const Span& span, int64_t begin, float* dst, int64_t pitch, int64_t n) {
  load_basis_rows(basis, span.column + begin, dst, pitch, n);
  for (int64_t b = 0; b < span.batch; ++b) {
    load_tile(gradient(span, b, begin), span.dtype, dst + (basis.rows + b) * pitch, n);
  }
}

constexpr int64_t kStretchBytes = 192 << 10;  // of floats of all rows at once, inside L2

// Columns of a buffer of about this size: whole cache lines, at least four of them, at most `most`.
static int64_t columns_within(int64_t bytes, int64_t bytes_per_column, int64_t most) {
  const int64_t columns = bytes / bytes_per_column / 16 * 16;
  return columns < 64 ? 64 : min64(columns, most);
}

template <class E>
static void narrow_row(const float* src, typename E::Type* dst, int64_t n, Float scale) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store_as(E{}, dst + i, load(src + i) * scale);
  if (i < n) store_part<E>(dst + i, load(src + i) * scale, n - i);
}

// dst = scale * src, rounded once.
static void store_tile(const float* src, void* dst, DType dtype, int64_t n, float scale = 1.0f) {
  switch (dtype) {
    case DType::kF32:
      return narrow_row<F32>(src, static_cast<float*>(dst), n, splat(scale));
    case DType::kBF16:
      return narrow_row<BF16>(src, static_cast<uint16_t*>(dst), n, splat(scale));
    case DType::kF16:
      return narrow_row<F16>(src, static_cast<uint16_t*>(dst), n, splat(scale));
    case DType::kI8:
    case DType::kF8:
      return;
  }
}

// Finaliser of MurmurHash3 (Appleby, public domain).
template <class T>
CARERL_INLINE T mix32(T x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Stochastic rounding: random bits below the last kept one, then truncation. The bits are a pure function of seed, row
// and column, the same as in reference.py, so that every backend and every split of N draws the same. Magnitudes below
// 2^-14 have fewer bits in fp16: lifted by 2^-14, the bits to drop are in their place again.
template <class E, int kDropped>
static void narrow_row_randomly(const float* src, typename E::Type* dst, int64_t n, int64_t column, int64_t row,
                                int64_t seed) {
  const uint32_t key = mix32<uint32_t>(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32);
  const uint32_t row_key = static_cast<uint32_t>(row + 1) * 0x85ebca77u + key;
  Word lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  for (int64_t i = 0; i < n; i += kWidth) {
    const int64_t position = column + i;
    const uint32_t high = static_cast<uint32_t>(position >> 32) * 0xc2b2ae3du + row_key;
    const Word word = (lane + static_cast<uint32_t>(position)) * 0x9e3779b1u + high;
    const Word noise = mix32<Word>(word) >> (32 - kDropped);
    const Word bits = as_word(load(src + i)), sign = bits & 0x80000000u;
    const Float size = as_float(bits ^ sign);
    Float lift = {};
    if (kDropped == 13) lift = as_float((Word)(size < splat(0x1p-14f)) & as_word(splat(0x1p-14f)));
    const Float kept = as_float((as_word(size + lift) + noise) & ~((1u << kDropped) - 1));
    const Float value = as_float(as_word(kept - lift) | sign);
    if (i + kWidth <= n)
      store_as(E{}, dst + i, value);
    else
      store_part<E>(dst + i, value, n - i);
  }
}

// A row of rotated bases back to storage.
static void store_basis(const Basis& basis, int64_t row, int64_t column, const float* src, int64_t n, int64_t seed) {
  void* dst = at(basis.data, basis.dtype, row * basis.stride + column);
  if (seed == 0 || basis.dtype == DType::kF32) return store_tile(src, dst, basis.dtype, n);
  if (basis.dtype == DType::kBF16) {
    narrow_row_randomly<BF16, 16>(src, static_cast<uint16_t*>(dst), n, column, row, seed);
  } else {
    narrow_row_randomly<F16, 13>(src, static_cast<uint16_t*>(dst), n, column, row, seed);
  }
}

}  // namespace carerl::cpu::CARERL_ISA
