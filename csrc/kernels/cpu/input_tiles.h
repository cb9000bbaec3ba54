// The products of input.h on AMX tiles, for weight matrices of every type, as exact as products in fp32 are.
// Directions are cut into terms once for a matrix, weights and corrections a block of outputs at a time.
#pragma once

#include "input_operands.h"
#include "input_rule.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kMoveTerms = 3;      // of a correction
constexpr int64_t kDeepSteps = 8;  // steps of a block that is cut into terms at a time, which stays in L2
constexpr int64_t kRowsAhead = 8;  // from the row that is cut to the one that is asked for

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
  Arrays arrays(bytes);
  char* across = arrays.next<char>();
  char* along = arrays.next<char>();
  char* weights = arrays.next<char>();
  float* products = arrays.next<float>();
  char* moves = arrays.next<char>();
  float* correction = arrays.next<float>();
  int32_t* names = arrays.next<int32_t>();
  pack_input_directions<E, D>(in, across, rule == nullptr ? nullptr : along);
  __builtin_memset(products, 0, bytes[3]);  // directions beyond the last one stay zero
  const Tiles project = packed_tiles<D>(across, steps), edit = packed_tiles<D>(along, directions);
  const Tiles moved_rows = packed_tiles<X>(moves, directions);
  typename E::Type* matrix = static_cast<typename E::Type*>(in.matrix);
  const TileRegisters registers;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = min64(block, end - first), strips = tiles_of(rows, kSide);
    if (steps == 0) __builtin_memset(products, 0, bytes[3]);
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
          add_lanes<E>(w + names[row + r] * n + column, lanes, correction + r * 2 * kSide);
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
  Arrays arrays(bytes);
  char* across = arrays.next<char>();
  char* along = arrays.next<char>();
  char* weights = arrays.next<char>();
  float* products = arrays.next<float>();  // [directions, columns]
  float* turned = arrays.next<float>();    // of two strips of columns, one after another
  char* moves = arrays.next<char>();
  float* correction = arrays.next<float>();
  __mmask16* moved = arrays.next<__mmask16>();
  pack_input_directions<E, D>(in, across, rule == nullptr ? nullptr : along);
  __builtin_memset(products, 0, bytes[3]);  // directions beyond the last one stay zero
  const Tiles project = packed_tiles<D>(across, steps), edit = packed_tiles<D>(along, directions);
  const Tiles moved_columns = packed_tiles<X>(moves, directions);
  typename E::Type* matrix = static_cast<typename E::Type*>(in.matrix);
  const TileRegisters registers;
  for (int64_t first = begin; first < end; first += block) {
    const int64_t columns = min64(block, end - first);
    if (steps == 0) __builtin_memset(products, 0, bytes[3]);
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
          add_lanes<E>(matrix + (row + r) * n + first + column, lanes, correction + r * 2 * kSide);
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
