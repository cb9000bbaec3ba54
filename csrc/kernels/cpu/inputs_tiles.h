// The products of inputs.h on AMX tiles, for weight matrices of every type, as exact as products in fp32 are.
// Directions are cut into terms once for a matrix, weights and corrections a block of outputs at a time.
#pragma once

#include "input_rule.h"
#include "tile.h"
#include "tiles.h"
#include "transpose.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int64_t kPatch = 32;     // rows and columns of a patch of directions: two strips, one step
constexpr int64_t kDeepSteps = 8;  // steps of a block that is cut into terms at a time, which stays in L2

// Terms that hold a weight exactly, and a correction.
template <class E>
constexpr int kWeightTerms = __is_same(E, F32)   ? 3
                             : __is_same(E, F16) ? 2
                                                 : 1;
constexpr int kMoveTerms = 3;
constexpr int64_t kRowsAhead = 8;  // from the row that is cut to the one that is asked for

// bf16 weights lie in memory as a tile has them: input 2p beside 2p + 1. Whatever is cut has input p beside p + 16.
template <class E>
constexpr bool kAsStored = __is_same(E, BF16);

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

// Memory of a call, one array after another.
class Arrays {
 public:
  // Bytes of arrays in whole cache lines.
  static int64_t lines(int64_t bytes) { return round_up(bytes, 64); }
  explicit Arrays(int64_t bytes) : next_(static_cast<char*>(scratch(bytes))) {}
  template <class T>
  T* take(int64_t bytes) {
    char* own = next_;
    next_ += lines(bytes);
    return reinterpret_cast<T*>(own);
  }

 private:
  char* next_;
};

// ---------------------------------------------------------------------------------------------------- rows of outputs

// `rows` rows of W from a column on as the left operand, `steps` of them, zeros behind.
template <class E>
static void pack_weight_rows(const typename E::Type* w, int64_t n, int64_t rows, int64_t columns, int64_t steps,
                             char* tiles) {
  constexpr int T = kWeightTerms<E>;
  for (int64_t row = 0; row < rows; ++row, w += n) {
    char* tile = tiles + row / kSide * steps * T * kTerm + row % kSide * kTileRow;
    for (int64_t k = 0; k < steps; ++k, tile += T * kTerm) {
      const int64_t at = k * kDeep, there = columns - at;
      ask_for<E>(w + kRowsAhead * n + at);
      if constexpr (kAsStored<E>) {
        const __mmask32 lanes = there >= kDeep ? ~0u : (1u << there) - 1;
        _mm512_storeu_si512(tile, _mm512_maskz_loadu_epi16(lanes, w + at));
      } else {
        store_terms<T>(load_lanes<E>(w + at, first_lanes(there)),
                       load_lanes<E>(w + at + kWidth, first_lanes(there - kWidth)), tile);
      }
    }
  }
}

// Without a rule coefficients go to `out`, else rows are edited by it.
template <class E, int D>
static void tile_rows(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule* rule, float* out,
                      double* energies) {
  constexpr int T = kWeightTerms<E>, X = kMoveTerms;
  const int64_t n = in.columns, count = in.count, steps = tiles_of(n, kDeep), directions = tiles_of(count, kDeep);
  const int64_t pitch = directions * kDeep, most = round_up(block, 2 * kSide);
  const int64_t bytes[] = {2 * directions * steps * D * kTerm,
                           rule == nullptr ? 0 : 2 * steps * directions * D * kTerm,
                           most / kSide * (kAsStored<E> ? steps : min64(steps, kDeepSteps)) * T * kTerm,
                           most * pitch * int64_t{sizeof(float)},
                           most / kSide * directions * X * kTerm,
                           2 * kSide * 2 * kSide * int64_t{sizeof(float)},
                           most * int64_t{sizeof(int32_t)}};
  int64_t total = 0;
  for (int64_t size : bytes) total += Arrays::lines(size);
  Arrays arrays(total);
  char* across = arrays.take<char>(bytes[0]);
  char* along = arrays.take<char>(bytes[1]);
  char* weights = arrays.take<char>(bytes[2]);
  float* products = arrays.take<float>(bytes[3]);
  char* moves = arrays.take<char>(bytes[4]);
  float* correction = arrays.take<float>(bytes[5]);
  int32_t* names = arrays.take<int32_t>(bytes[6]);
  pack_input_directions<E, D>(in, across, rule == nullptr ? nullptr : along);
  __builtin_memset(products, 0, bytes[3]);
  const Tiles project = packed_tiles<D>(across, steps), edit = packed_tiles<D>(along, directions);
  const Tiles moved_rows = packed_tiles<X>(moves, directions);
  typename E::Type* matrix = static_cast<typename E::Type*>(in.matrix);
  const TileRegisters registers;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = min64(block, end - first), strips = tiles_of(rows, kSide);
    typename E::Type* w = matrix + first * n;
    if (kAsStored<E> && n % kDeep == 0 && rows % kSide == 0) {
      const Tiles stored{reinterpret_cast<const char*>(w), kSide * n * 2, kTileRow, n * 2};
      multiply_strips<T, D, kAsStored<E>>(stored, strips, project, tiles_of(count, kSide), steps, products, pitch,
                                          true);
    } else {
      const int64_t together = kAsStored<E> ? steps : min64(steps, kDeepSteps);
      for (int64_t k = 0; k < steps; k += together) {
        const int64_t deep = min64(together, steps - k);
        pack_weight_rows<E>(w + k * kDeep, n, rows, n - k * kDeep, deep, weights);
        const Tiles b{project.data + k * project.step, project.strip, project.step, project.pitch};
        multiply_strips<T, D>(packed_tiles<T>(weights, deep), strips, b, tiles_of(count, kSide), deep, products, pitch,
                              k == 0);
      }
    }
    if (rule == nullptr) {
      for (int64_t row = 0; row < rows; ++row) {
        __builtin_memcpy(out + (first + row) * count, products + row * pitch, count * sizeof(float));
      }
      continue;
    }
    int64_t moved = 0;
    Energy energy;
    for (int64_t row = 0; row < rows; ++row) {
      float* x = products + row * pitch;
      if (!correct(*rule, first + row, count, x, energy)) continue;
      char* tile = moves + moved / kSide * moved_rows.strip + moved % kSide * kTileRow;
      for (int64_t d = 0; d < directions; ++d, tile += moved_rows.step) {
        store_terms<X>(load(x + d * kDeep), load(x + d * kDeep + kWidth), tile);
      }
      names[moved++] = static_cast<int32_t>(row);
    }
    *energies++ = energy.total();
    for (int64_t column = 0; moved > 0 && column < n; column += 2 * kSide) {
      const Tiles b{edit.data + column / kSide * edit.strip, edit.strip, edit.step, edit.pitch};
      const __mmask16 lanes[] = {first_lanes(n - column), first_lanes(n - column - kWidth)};
      for (int64_t row = 0; row < moved; row += 2 * kSide) {
        const Tiles a{moves + row / kSide * moved_rows.strip, moved_rows.strip, moved_rows.step, moved_rows.pitch};
        for (int64_t r = 0; r < min64(2 * kSide, moved - row); ++r) ask_for<E>(w + names[row + r] * n + column);
        multiply_strips<X, D>(a, min64(2, tiles_of(moved - row, kSide)), b, 2, directions, correction, 2 * kSide, true);
        for (int64_t r = 0; r < min64(2 * kSide, moved - row); ++r) {
          typename E::Type* to = w + names[row + r] * n + column;
          CARERL_UNROLL
          for (int v = 0; v < 2; ++v) {
            const Float change = load(correction + r * 2 * kSide + v * kWidth);
            if (lanes[v] != 0)
              store_lanes<E>(to + v * kWidth, lanes[v], load_lanes<E>(to + v * kWidth, lanes[v]) + change);
          }
        }
      }
    }
  }
}

// ------------------------------------------------------------------------------------------------- columns of outputs

// Rows [0, rows) of W and `columns` of it as the right operand, zeros behind. Whole lines of W, since they lie far
// apart.
template <class E>
static void pack_weight_columns(const typename E::Type* w, int64_t n, int64_t rows, int64_t columns, int64_t steps,
                                char* tiles) {
  constexpr int T = kWeightTerms<E>;
  const int64_t strip = steps * T * kTerm;
  for (int64_t k = 0; k < steps; ++k) {
    for (int64_t c = 0; c < columns; c += 2 * kSide) {
      for (int64_t p = 0; p < kSide; ++p) {
        const int64_t low = k * kDeep + p, high = low + kSide;
        char* tile = tiles + c / kSide * strip + k * T * kTerm + p * kTileRow;
        for (int64_t s = 0; s < 2; ++s, tile += strip) {
          const __mmask16 lanes = first_lanes(columns - c - s * kSide);
          const typename E::Type* from = w + c + s * kSide;
          __builtin_prefetch(from + (low + kDeep) * n);
          __builtin_prefetch(from + (high + kDeep) * n);
          store_terms<T>(load_lanes<E>(from + low * n, low < rows ? lanes : 0),
                         load_lanes<E>(from + high * n, high < rows ? lanes : 0), tile);
        }
      }
    }
  }
}

template <class E, int D>
static void tile_columns(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule* rule, float* out,
                         double* energies) {
  constexpr int T = kWeightTerms<E>, X = kMoveTerms;
  const int64_t m = in.rows, n = in.columns, count = in.count;
  const int64_t steps = tiles_of(m, kDeep), directions = tiles_of(count, kDeep), deep = min64(steps, kDeepSteps);
  const int64_t pitch = directions * kDeep, width = round_up(block, 2 * kSide);
  const int64_t bytes[] = {2 * directions * steps * D * kTerm,
                           rule == nullptr ? 0 : 2 * steps * directions * D * kTerm,
                           width / kSide * deep * T * kTerm,
                           pitch * width * int64_t{sizeof(float)},
                           2 * kSide * pitch * int64_t{sizeof(float)},
                           width / kSide * directions * X * kTerm,
                           2 * kSide * 2 * kSide * int64_t{sizeof(float)},
                           width / kSide * int64_t{sizeof(__mmask16)}};
  int64_t total = 0;
  for (int64_t size : bytes) total += Arrays::lines(size);
  Arrays arrays(total);
  char* across = arrays.take<char>(bytes[0]);
  char* along = arrays.take<char>(bytes[1]);
  char* weights = arrays.take<char>(bytes[2]);
  float* products = arrays.take<float>(bytes[3]);  // [directions, columns]
  float* turned = arrays.take<float>(bytes[4]);    // of two strips of columns, one after another
  char* moves = arrays.take<char>(bytes[5]);
  float* correction = arrays.take<float>(bytes[6]);
  __mmask16* moved = arrays.take<__mmask16>(bytes[7]);
  pack_input_directions<E, D>(in, across, rule == nullptr ? nullptr : along);
  __builtin_memset(products, 0, bytes[3]);
  const Tiles project = packed_tiles<D>(across, steps), edit = packed_tiles<D>(along, directions);
  const Tiles moved_columns = packed_tiles<X>(moves, directions);
  typename E::Type* matrix = static_cast<typename E::Type*>(in.matrix);
  const TileRegisters registers;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t columns = min64(block, end - first);
    for (int64_t k = 0; k < steps; k += deep) {
      const int64_t some = min64(deep, steps - k);
      pack_weight_columns<E>(matrix + k * kDeep * n + first, n, m - k * kDeep, columns, some, weights);
      const Tiles a{project.data + k * project.step, project.strip, project.step, project.pitch};
      multiply_strips<D, T>(a, tiles_of(count, kSide), packed_tiles<T>(weights, some), tiles_of(columns, kSide), some,
                            products, width, k == 0);
    }
    Energy energy;
    bool any = false;
    for (int64_t column = 0; column < columns; column += kPatch) {
      const int64_t there = min64(kPatch, columns - column);
      transpose_eights(products + column, width, pitch, kPatch, turned, pitch);
      if (rule == nullptr) {
        for (int64_t c = 0; c < there; ++c) {
          __builtin_memcpy(out + (first + column + c) * count, turned + c * pitch, count * sizeof(float));
        }
        continue;
      }
      uint32_t moving = 0;
      for (int64_t c = 0; c < there; ++c) {
        const bool moves_it = correct(*rule, first + column + c, count, turned + c * pitch, energy);
        moving |= static_cast<uint32_t>(moves_it) << c;
      }
      moved[column / kSide] = static_cast<__mmask16>(moving);
      moved[column / kSide + 1] = static_cast<__mmask16>(moving >> kSide);
      any |= moving != 0;
      // As columns of the right operand: what does not move is multiplied too, and not written.
      transpose_eights(turned, pitch, kPatch, pitch, products + column, width);
      for (int64_t d = 0; d < directions; ++d) {
        for (int64_t s = 0; s < 2; ++s) {
          char* tile = moves + (column / kSide + s) * moved_columns.strip + d * moved_columns.step;
          const float* x = products + d * kDeep * width + column + s * kSide;
          for (int64_t p = 0; p < kSide; ++p) {
            store_terms<X>(load(x + p * width), load(x + (p + kSide) * width), tile + p * kTileRow);
          }
        }
      }
    }
    if (rule == nullptr) continue;
    *energies++ = energy.total();
    for (int64_t row = 0; any && row < m; row += 2 * kSide) {
      const Tiles a{edit.data + row / kSide * edit.strip, edit.strip, edit.step, edit.pitch};
      for (int64_t column = 0; column < columns; column += 2 * kSide) {
        const __mmask16* lanes = moved + column / kSide;
        if ((lanes[0] | lanes[1]) == 0) continue;
        const Tiles b{moves + column / kSide * moved_columns.strip, moved_columns.strip, moved_columns.step,
                      moved_columns.pitch};
        for (int64_t r = 0; r < min64(2 * kSide, m - row); ++r) ask_for<E>(matrix + (row + r) * n + first + column);
        multiply_strips<D, X>(a, 2, b, 2, directions, correction, 2 * kSide, true);
        for (int64_t r = 0; r < min64(2 * kSide, m - row); ++r) {
          typename E::Type* to = matrix + (row + r) * n + first + column;
          CARERL_UNROLL
          for (int v = 0; v < 2; ++v) {
            const Float change = load(correction + r * 2 * kSide + v * kWidth);
            if (lanes[v] != 0)
              store_lanes<E>(to + v * kWidth, lanes[v], load_lanes<E>(to + v * kWidth, lanes[v]) + change);
          }
        }
      }
    }
  }
}

static void tile_outputs(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule* rule, float* out,
                         double* energies) {
  with_gradient(in.dtype, [&](auto type) {
    using E = decltype(type);
    const auto run = in.direction_dtype == DType::kF32 ? (in.left ? tile_columns<E, 3> : tile_rows<E, 3>)
                                                       : (in.left ? tile_columns<E, 1> : tile_rows<E, 1>);
    run(in, begin, end, block, rule, out, energies);
  });
}

// Enough of them that directions, which may have to come from the third-level cache for every block, are used often.
static int64_t input_block(const Input& in) { return in.left ? 256 : 192; }

static void input_project(const Input& in, int64_t begin, int64_t end, int64_t block, float* out) {
  tile_outputs(in, begin, end, block, nullptr, out, nullptr);
}

static void input_edit(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule& rule,
                       double* energies) {
  tile_outputs(in, begin, end, block, &rule, nullptr, energies);
}

}  // namespace carerl::cpu::CARERL_ISA
