// Products on AMX tiles: 16 x 16 sums in fp32 of products of bf16, 16 rows by 32 numbers of the left operand with 32 by
// 16 of the right one. A number of more bits is the sum of several bf16 terms, and a product the sum over the terms'
// products that count: fp32 has three terms exactly, and six products of nine are left. The instruction takes subnormal
// numbers for zero.
#pragma once

#include "simd.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int64_t kSide = 16;     // rows of a tile, and sums across it
constexpr int64_t kDeep = 32;     // numbers summed over by one instruction
constexpr int64_t kTerm = 1024;   // bytes of a tile
constexpr int64_t kTileRow = 64;  // bytes of one of its rows

CARERL_INLINE int64_t tiles_of(int64_t n, int64_t side) { return (n + side - 1) / side; }

// Tiles of an operand: of strip s (16 rows of the left one, 16 columns of the right one), step k (32 numbers) and term
// t at data + s * strip + k * step + t * kTerm, their rows `pitch` bytes apart.
struct Tiles {
  const char* data;
  int64_t strip, step, pitch;
};

// Tiles side by side, [strip, step, term].
template <int T>
CARERL_INLINE Tiles packed_tiles(const char* data, int64_t steps) {
  return {data, steps * T * kTerm, T * kTerm, kTileRow};
}

// The tile registers of this thread for as long as it lives, all of them 16 rows of 64 bytes.
class TileRegisters {
 public:
  TileRegisters() {
    struct Shape {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
      uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
    };
    alignas(64) static constexpr Shape kShape;
    _tile_loadconfig(&kShape);
  }
  ~TileRegisters() { _tile_release(); }
  TileRegisters(const TileRegisters&) = delete;
  TileRegisters& operator=(const TileRegisters&) = delete;
};

// sums [A * 16, B * 16], rows `pitch` floats apart, += the products of A strips of the left operand, of TA terms a
// number, and B strips of the right one, of TB terms: those products of terms that are no smaller than the first one
// left out of the longer operand. With `first`, sums start at zero. `kStored`: the left
// operand lies in memory as a matrix, and its next rows are asked for.
template <int A, int B, int TA, int TB, bool kStored>
static void multiply_tiles(const Tiles& a, const Tiles& b, int64_t steps, float* sums, int64_t pitch, bool first) {
  constexpr int kTerms = TA > TB ? TA : TB;
  const int64_t across = pitch * sizeof(float);
  float* const below = sums + kSide * pitch;
  __asm__ volatile("" ::: "memory");  // of loads into tiles GCC does not know that they read memory
  if (first) {
    _tile_zero(0);
    _tile_zero(1);
    _tile_zero(2);
    _tile_zero(3);
  } else {
    _tile_loadd(0, sums, across);
    if constexpr (B == 2) _tile_loadd(1, sums + kSide, across);
    if constexpr (A == 2) _tile_loadd(2, below, across);
    if constexpr (A * B == 4) _tile_loadd(3, below + kSide, across);
  }
  const char *left = a.data, *right = b.data;
  for (int64_t k = 0; k < steps; ++k, left += a.step, right += b.step) {
    if constexpr (kStored) {
      CARERL_UNROLL
      for (int row = 0; row < 2 * kSide; ++row) __builtin_prefetch(left + 2 * a.strip + row * a.pitch);
    }
    int held = -1;  // the right operand's term in its registers
    CARERL_UNROLL
    for (int i = 0; i < TA; ++i) {
      _tile_loadd(4, left + i * kTerm, a.pitch);
      if constexpr (A == 2) _tile_loadd(5, left + a.strip + i * kTerm, a.pitch);
      const int count = kTerms - i < TB ? kTerms - i : TB;
      CARERL_UNROLL
      for (int turn = 0; turn < count; ++turn) {
        const int j = i % 2 == 0 ? count - 1 - turn : turn;
        if (j != held) {
          _tile_loadd(6, right + j * kTerm, b.pitch);
          if constexpr (B == 2) _tile_loadd(7, right + b.strip + j * kTerm, b.pitch);
        }
        held = j;
        _tile_dpbf16ps(0, 4, 6);
        if constexpr (B == 2) _tile_dpbf16ps(1, 4, 7);
        if constexpr (A == 2) _tile_dpbf16ps(2, 5, 6);
        if constexpr (A * B == 4) _tile_dpbf16ps(3, 5, 7);
      }
    }
  }
  _tile_stored(0, sums, across);
  if constexpr (B == 2) _tile_stored(1, sums + kSide, across);
  if constexpr (A == 2) _tile_stored(2, below, across);
  if constexpr (A * B == 4) _tile_stored(3, below + kSide, across);
}

// The same for any number of strips of either, two by two.
template <int TA, int TB, bool kStored = false>
static void multiply_strips(const Tiles& a, int64_t rows, const Tiles& b, int64_t columns, int64_t steps, float* sums,
                            int64_t pitch, bool first) {
  for (int64_t j = 0; j < columns; j += 2) {
    const Tiles right{b.data + j * b.strip, b.strip, b.step, b.pitch};
    for (int64_t i = 0; i < rows; i += 2) {
      const Tiles left{a.data + i * a.strip, a.strip, a.step, a.pitch};
      const auto multiply =
          rows - i > 1
              ? (columns - j > 1 ? multiply_tiles<2, 2, TA, TB, kStored> : multiply_tiles<2, 1, TA, TB, kStored>)
              : (columns - j > 1 ? multiply_tiles<1, 2, TA, TB, kStored> : multiply_tiles<1, 1, TA, TB, kStored>);
      multiply(left, right, steps, sums + i * kSide * pitch + j * kSide, pitch, first);
    }
  }
}

// ------------------------------------------------------------------------------------------------------------- terms

// Two vectors as one row of each of T tiles, number i beside number i + 16. Cut rather than rounded: exact for fp32 in
// three terms, fp16 in two and bf16 in one, for a quarter of the work, and nothing becomes infinite.
template <int T>
CARERL_INLINE void store_terms(Float low, Float high, char* tile) {
  CARERL_UNROLL
  for (int t = 0; t < T; ++t, tile += kTerm) {
    const Word a = as_word(low) & 0xffff0000u, b = as_word(high) & 0xffff0000u;
    *reinterpret_cast<LooseWord*>(tile) = (a >> 16) | b;
    low -= as_float(a);
    high -= as_float(b);
  }
}

}  // namespace carerl::cpu::CARERL_ISA
