// Tiles: short stretches of rows as floats in L1, and back to storage.
#pragma once

#include "simd.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kRows = 4;         // rows of the bases read side by side; one stream is 30 % slower, eight are not faster
constexpr int64_t kTile = 2048;  // elements of a tile that is gone through several times: 8 KiB of floats in L1
constexpr int64_t kFold = 512;   // elements summed in fp32 before the lanes go to fp64 totals
constexpr int64_t kUsualBlock = 128;  // of a scale: loops over it have a constant length, 6 % faster than a count
constexpr int64_t kMaxBatch = 16;  // gradients handled together; more are done in turns, each reading the bases again

template <int kValue>
struct Constant {
  static constexpr int value = kValue;
};

CARERL_INLINE bool is_scaled(const Basis& basis) { return basis.dtype >= DType::kI8; }

// Elements of a row that passes 1 and 2 read before they go to the next rows. The longer, the rarer the memory system
// has to find a new stream: 64 KiB of fp32 read 15 % faster than 8 KiB, and pass 2 with 32 KiB of int8 25 % faster than
// with 8. Several gradients share the room, 64 KiB of L2, since they are kept as floats.
[[maybe_unused]] static int64_t tile_length(const Basis& basis, int64_t batch) {
  if (batch <= 1) return is_scaled(basis) ? 32768 : 16384;
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
// End of the run of one scale: the block border after `column`, or `end`.
CARERL_INLINE int64_t run_end(const Basis& basis, int64_t column, int64_t end) {
  return min64(end, ((column >> basis.block_shift) + 1) << basis.block_shift);
}

// f(F32{}), f(BF16{}), ...: whatever the rows of the bases, or a gradient, are stored as.
template <class F>
CARERL_INLINE void with_storage(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kF32:
      return f(F32{});
    case DType::kBF16:
      return f(BF16{});
    case DType::kF16:
      return f(F16{});
    case DType::kI8:
      return f(I8{});
    case DType::kF8:
      return f(F8{});
  }
}
template <class F>
CARERL_INLINE void with_gradient(DType dtype, const F& f) {
  switch (dtype) {
    case DType::kBF16:
      return f(BF16{});
    case DType::kF16:
      return f(F16{});
    default:
      return f(F32{});
  }
}

// Asks for columns of all rows and gradients before they are needed, a part at each fetch(), so that memory works while
// what came before is computed.
class Ahead {
 public:
  // Nothing is fetched where n <= 0; `parts`: how often fetch() is called.
  Ahead(const Basis& basis, const Span& span, int64_t begin, int64_t n, int64_t parts)
      : row_(static_cast<const char*>(basis.data) + (span.column + begin) * element_size(basis.dtype)),
        gradient_(static_cast<const char*>(span.grads) + begin * element_size(span.dtype)),
        row_stride_(basis.stride * element_size(basis.dtype)),
        gradient_stride_(span.stride * element_size(span.dtype)),
        row_bytes_(n * element_size(basis.dtype)),
        gradient_bytes_(n * element_size(span.dtype)),
        rows_(basis.rows),
        lines_(n <= 0 ? 0 : basis.rows * lines_of(row_bytes_) + span.batch * lines_of(gradient_bytes_)),
        share_(lines_ / (parts > 0 ? parts : 1) + 1) {}

  void fetch() {
    for (int64_t left = min64(share_, lines_); left > 0;) {
      const bool is_row = next_ < rows_;
      const int64_t bytes = is_row ? row_bytes_ : gradient_bytes_;
      const char* p = (is_row ? row_ + next_ * row_stride_ : gradient_ + (next_ - rows_) * gradient_stride_) + at_;
      const int64_t run = min64(left, lines_of(bytes - at_));
      for (const char* end = p + run * 64; p < end; p += 64) __builtin_prefetch(p, 0, 2);
      left -= run;
      lines_ -= run;
      at_ += run * 64;
      if (at_ >= bytes) {
        at_ = 0;
        ++next_;
      }
    }
  }

 private:
  static int64_t lines_of(int64_t bytes) { return (bytes + 63) / 64; }

  const char *row_, *gradient_;
  int64_t row_stride_, gradient_stride_, row_bytes_, gradient_bytes_, rows_, lines_, share_, next_ = 0, at_ = 0;
};

// n floats or doubles of a gradient in the order of E, and zeros up to the next whole group.
template <class E, class T>
static void load_gradient(const void* src, DType dtype, T* dst, int64_t n) {
  with_gradient(dtype, [&](auto type) {
    using G = decltype(type);
    const typename G::Type* from = static_cast<const typename G::Type*>(src);
    for (int64_t i = 0; i < n; i += kGroup<E>) {
      Float x[kVectors<E>];
      load_arranged<E, G>(from + i, n - i, x);
      CARERL_UNROLL
      for (int v = 0; v < kVectors<E>; ++v) put(dst + i + v * kWidth, x[v]);
    }
  });
}

// n floats in the order of memory.
template <class E>
static void load_plain(const typename E::Type* src, float* dst, int64_t n) {
  int64_t i = 0;
  for (; i + kWidth <= n; i += kWidth) store(dst + i, E::load(src + i));
  if (i == n) return;
  typename E::Type padded[kWidth] = {};
  __builtin_memcpy(padded, src + i, (n - i) * sizeof(*src));
  const Float rest = E::load(padded);
  for (int64_t lane = 0; lane < n - i; ++lane) dst[i + lane] = rest[lane];
}

// dst = scale * src, rounded once.
template <class E>
static void store_gradient(const float* src, void* dst, DType dtype, int64_t n, float scale) {
  with_gradient(dtype, [&](auto type) {
    using G = decltype(type);
    typename G::Type* to = static_cast<typename G::Type*>(dst);
    for (int64_t i = 0; i < n; i += kGroup<E>) {
      Float x[kVectors<E>];
      CARERL_UNROLL
      for (int v = 0; v < kVectors<E>; ++v) x[v] = load(src + i + v * kWidth) * splat(scale);
      store_arranged<E, G>(to + i, x, n - i);
    }
  });
}

// R rows side by side, as load_gradient has them.
template <class E, int R, class T>
static void load_rows(const Basis& basis, int64_t row, int64_t column, T* dst, int64_t pitch, int64_t n) {
  const typename E::Type* src = element<E>(basis, row, column);
  for (int64_t i = 0; i < n; i += kGroup<E>) {
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      Float x[kVectors<E>];
      load_group<E>(src + r * basis.stride + i, n - i, x);
      CARERL_UNROLL
      for (int v = 0; v < kVectors<E>; ++v) put(dst + r * pitch + i + v * kWidth, x[v]);
    }
  }
}

template <class E, class T>
static void load_scaled_row(const Basis& basis, int64_t row, int64_t column, T* dst, int64_t n) {
  const typename E::Type* src = element<E>(basis, row, column);
  for (int64_t i = 0; i < n;) {
    const int64_t end = run_end(basis, column + i, column + n) - column;
    const Float scale = splat(scale_row(basis, row)[(column + i) >> basis.block_shift]);
    for (; i < end; i += kGroup<E>) {
      Float x[kVectors<E>];
      load_group<E>(src + i, end - i, x);
      CARERL_UNROLL
      for (int v = 0; v < kVectors<E>; ++v) put(dst + i + v * kWidth, x[v] * scale);
    }
  }
}

// All rows of the bases, as load_gradient has them.
template <class E, class T>
static void load_basis(const Basis& basis, int64_t column, T* dst, int64_t pitch, int64_t n, Ahead& ahead) {
  int64_t row = 0;
  for (; !is_scaled(basis) && row + kRows <= basis.rows; row += kRows) {
    load_rows<E, kRows>(basis, row, column, dst + row * pitch, pitch, n);
    ahead.fetch();
  }
  for (; row < basis.rows; ++row) {
    if (is_scaled(basis)) {
      load_scaled_row<E>(basis, row, column, dst + row * pitch, n);
    } else {
      load_rows<E, 1>(basis, row, column, dst + row * pitch, pitch, n);
    }
  }
}

// Rows [U; G] of a span from `begin` on.
template <class E, class T>
static void load_stack(const Basis& basis, const Span& span, int64_t begin, T* dst, int64_t pitch, int64_t n,
                       Ahead& ahead) {
  load_basis<E>(basis, span.column + begin, dst, pitch, n, ahead);
  for (int64_t b = 0; b < span.batch; ++b) {
    load_gradient<E>(gradient(span, b, begin), span.dtype, dst + (basis.rows + b) * pitch, n);
  }
}

constexpr int64_t kTileBytes = 12 << 10;      // of rows as floats, inside L1
constexpr int64_t kStretchBytes = 160 << 10;  // of rows as stored: this stretch and the next one inside L2

// Columns of a buffer of about this size: multiples of 64, whole groups and cache lines of every type, at most `most`.
[[maybe_unused]] static int64_t columns_within(int64_t bytes, int64_t bytes_per_column, int64_t most) {
  const int64_t columns = bytes / bytes_per_column / 64 * 64;
  return columns < 64 ? 64 : min64(columns, most);
}

// Columns that are brought from memory together, some tiles of them.
[[maybe_unused]] static int64_t stretch_of(const Basis& basis, const Span& span, int64_t tile) {
  const int64_t per_column = basis.rows * element_size(basis.dtype) + span.batch * element_size(span.dtype);
  const int64_t tiles = kStretchBytes / per_column / tile;
  return tile * (tiles < 1 ? 1 : tiles);
}

// Finaliser of MurmurHash3 (Appleby, public domain).
template <class T>
CARERL_INLINE T mix32(T x) {
  x = (x ^ (x >> 16)) * 0x85ebca6bu;
  x = (x ^ (x >> 13)) * 0xc2b2ae35u;
  return x ^ (x >> 16);
}

// Stochastic rounding of a row in the order of E: random bits below the last kept one, then truncation. The bits are a
// pure function of seed, row and column, the same as in reference.py, so that every backend and every split of N draws
// the same. Magnitudes below 2^-14 have fewer bits in fp16: lifted by 2^-14, the bits to drop are in their place again.
template <class E, int kDropped>
static void store_randomly(const Basis& basis, int64_t row, int64_t column, const float* src, int64_t n, int64_t seed) {
  typename E::Type* dst = element<E>(basis, row, column);
  const uint32_t key = mix32<uint32_t>(static_cast<uint32_t>(seed)) + static_cast<uint32_t>(seed >> 32);
  const uint32_t row_key = static_cast<uint32_t>(row + 1) * 0x85ebca77u + key;
  Word lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = i;
  for (int64_t i = 0; i < n; i += kGroup<E>) {
    Float x[kVectors<E>];
    CARERL_UNROLL
    for (int v = 0; v < kVectors<E>; ++v) x[v] = load(src + i + v * kWidth);
    Group<E>::restore(x);
    CARERL_UNROLL
    for (int v = 0; v < kVectors<E>; ++v) {
      const int64_t position = column + i + v * kWidth;
      const uint32_t high = static_cast<uint32_t>(position >> 32) * 0xc2b2ae3du + row_key;
      const Word word = (lane + static_cast<uint32_t>(position)) * 0x9e3779b1u + high;
      const Word noise = mix32<Word>(word) >> (32 - kDropped);
      const Word bits = as_word(x[v]), sign = bits & 0x80000000u;
      const Float size = as_float(bits ^ sign);
      Float lift = {};
      if (kDropped == 13) lift = as_float((Word)(size < splat(0x1p-14f)) & as_word(splat(0x1p-14f)));
      const Float kept = as_float((as_word(size + lift) + noise) & ~((1u << kDropped) - 1));
      x[v] = as_float(as_word(kept - lift) | sign);
    }
    Group<E>::arrange(x);
    store_group<E>(dst + i, x, n - i);
  }
}

}  // namespace carerl::cpu::CARERL_ISA
