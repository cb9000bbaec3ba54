// What the products of input_tiles.h are made of: weights, some lanes of them, and directions as operands of tiles.
#pragma once

#include "tile.h"
#include "tiles.h"
#include "transpose.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int64_t kPatch = 32;  // rows and columns of a patch of directions: two strips, one step
// bf16 weights lie in memory as a tile has them: input 2p beside 2p + 1. Whatever is cut has input p beside p + 16.
template <class E>
constexpr bool kAsStored = __is_same(E, BF16);
// Terms that hold a weight exactly.
template <class E>
constexpr int kWeightTerms = __is_same(E, F16) ? 2
                             : kAsStored<E>    ? 1
                                               : 3;

CARERL_INLINE __mmask16 first_lanes(int64_t n) { return n >= kWidth ? 0xffff : n <= 0 ? 0 : (1u << n) - 1; }

// Numbers whose bit is set; the others are zero, or left as they are.
template <class E>
CARERL_INLINE Float load_lanes(const typename E::Type* p, __mmask16 lanes) {
  if (lanes == 0xffff) return E::load(p);
  if constexpr (__is_same(E, F32)) {
    return (Float)_mm512_maskz_loadu_ps(lanes, p);
  } else {
    typename E::Type part[kWidth];
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(part), _mm256_maskz_loadu_epi16(lanes, p));
    return E::load(part);
  }
}
template <class E>
CARERL_INLINE void store_lanes(typename E::Type* p, __mmask16 lanes, Float x) {
  if (lanes == 0xffff) return store_as(E{}, p, x);
  if constexpr (__is_same(E, F32)) {
    _mm512_mask_storeu_ps(p, lanes, (__m512)x);
  } else {
    typename E::Type part[kWidth];
    store_as(E{}, part, x);
    _mm256_mask_storeu_epi16(p, lanes, _mm256_loadu_si256(reinterpret_cast<const __m256i*>(part)));
  }
}

// Two vectors of a row += numbers.
template <class E>
CARERL_INLINE void add_lanes(typename E::Type* p, const __mmask16* lanes, const float* numbers) {
  CARERL_UNROLL
  for (int v = 0; v < 2; ++v, p += kWidth, numbers += kWidth) {
    if (lanes[v] != 0) store_lanes<E>(p, lanes[v], load_lanes<E>(p, lanes[v]) + load(numbers));
  }
}

// Two vectors of weights that come soon. Rows lie so far apart that the hardware does not see them coming.
template <class E>
CARERL_INLINE void ask_for(const typename E::Type* p) {
  __builtin_prefetch(p);
  if (sizeof(*p) == 4) __builtin_prefetch(p + kWidth);
}

// The rows of a patch as rows of a left operand's two strips, or its columns as those of a right one's.
template <int T>
static void patch_rows(const float* patch, char* tiles, int64_t strip) {
  for (int64_t row = 0; row < kPatch; ++row) {
    const float* from = patch + row * kPatch;
    store_terms<T>(load(from), load(from + kSide), tiles + row / kSide * strip + row % kSide * kTileRow);
  }
}
template <int T, bool kNeighbours>
static void patch_columns(const float* patch, char* tiles, int64_t strip) {
  for (int64_t s = 0; s < 2; ++s) {
    for (int64_t p = 0; p < kSide; ++p) {
      const float* from = patch + s * kSide + (kNeighbours ? 2 * p : p) * kPatch;
      store_terms<T>(load(from), load(from + (kNeighbours ? 1 : kSide) * kPatch), tiles + s * strip + p * kTileRow);
    }
  }
}

// Directions of D terms as operands of both products, [strip, step, term]: with inputs summed over, and with directions
// summed over where `edit` is not null.
template <class E, int D>
static void pack_input_directions(const Input& in, char* project, char* edit) {
  const int64_t deep = tiles_of(in.inputs(), kDeep), directions = tiles_of(in.count, kDeep);
  const int64_t strip = deep * D * kTerm, strip_again = directions * D * kTerm;
  float patch[kPatch * kPatch], turned[kPatch * kPatch];
  for (int64_t d = 0; d < directions; ++d) {
    for (int64_t k = 0; k < deep; ++k) {
      const int64_t there = min64(in.inputs() - k * kDeep, kPatch);
      for (int64_t row = 0; row < kPatch; ++row) {
        const int64_t at = (d * kPatch + row) * in.inputs() + k * kDeep;
        for (int64_t c = 0; c < kPatch; c += kWidth) {
          const __mmask16 lanes = d * kPatch + row < in.count ? first_lanes(there - c) : 0;
          store(patch + row * kPatch + c,
                D == 3 ? load_lanes<F32>(static_cast<const float*>(in.directions) + at + c, lanes)
                       : load_lanes<BF16>(static_cast<const uint16_t*>(in.directions) + at + c, lanes));
        }
      }
      transpose_eights(patch, kPatch, kPatch, kPatch, turned, kPatch);
      char* first = project + 2 * d * strip + k * D * kTerm;
      char* second = edit + 2 * k * strip_again + d * D * kTerm;
      if (in.left) {
        patch_rows<D>(patch, first, strip);
        if (edit != nullptr) patch_rows<D>(turned, second, strip_again);
      } else {
        patch_columns<D, kAsStored<E>>(turned, first, strip);
        if (edit != nullptr) patch_columns<D, false>(patch, second, strip_again);
      }
    }
  }
}

// Scratch memory cut into arrays of so many bytes, each on a cache line of its own.
class Arrays {
 public:
  template <int N>
  explicit Arrays(const int64_t (&bytes)[N]) : bytes_(bytes) {
    int64_t total = 0;
    for (int64_t size : bytes) total += round_up(size, 64);
    at_ = static_cast<char*>(scratch(total));
  }
  template <class T>
  T* next() {
    char* own = at_;
    at_ += round_up(*bytes_++, 64);
    return reinterpret_cast<T*>(own);
  }

 private:
  const int64_t* bytes_;
  char* at_;
};

}  // namespace carerl::cpu::CARERL_ISA
