// One-sided directions of weight matrices: coefficients W V^T, and W <- W + x V with x a function of the coefficients
// of each row, in one pass: a block of rows is projected, classified and edited while it lies in L2. A row needs
// nothing but itself. With `left` the same of columns.
#pragma once

#include "block.h"
#include "input_rule.h"

namespace carerl::cpu::CARERL_ISA {

// Rows side by side: 24 sums of AVX-512's 32 registers, as many as fit elsewhere.
constexpr int kTall = CARERL_VECTOR_BYTES == 64 ? 12 : kStrip;
constexpr int64_t kPanel = kPair * kWidth;
constexpr int64_t kShallow = 192;  // products summed in registers: 24 KiB of an operand stay in L1 beside the other one

// f(Constant<R>{}, first) for strips of rows
template <class F>
CARERL_INLINE void for_strips(int64_t rows, const F& f) {
  int64_t row = 0;
  for (; row + kTall <= rows; row += kTall) f(Constant<kTall>{}, row);
  for (; row + 4 <= rows; row += 4) f(Constant<4>{}, row);
  for (; row < rows; ++row) f(Constant<1>{}, row);
}

// Asks for what comes next, some lines at each fetch(). Spread over the products: a core has 16 requests on their way
// and waits where there are more.
class Feed {
 public:
  void add(const void* p, int64_t bytes) {
    if (bytes <= 0) return;
    ranges_[count_++] = {static_cast<const char*>(p), static_cast<const char*>(p) + bytes};
    lines_ += bytes / 64 + 1;
  }
  void spread(int64_t parts) { share_ = lines_ / (parts > 0 ? parts : 1) + 1; }
  inline __attribute__((always_inline)) void fetch() {
    if (at_ == count_) return;
    Range& range = ranges_[at_];
    for (int64_t i = 0; i < share_ && range.p < range.end; ++i, range.p += 64) __builtin_prefetch(range.p, 0, 2);
    at_ += range.p >= range.end;
  }

 private:
  struct Range {
    const char *p, *end;
  };
  Range ranges_[4];
  int64_t count_ = 0, at_ = 0, lines_ = 0, share_ = 0;
};
constexpr int64_t kStep = 32;  // products between two fetches

// out[r] += sum_k a[r * across + k] b[k], b [depth, kPanel], V vectors of it
template <int R, int V>
static void add_panel(const float* a, int64_t across, const float* b, int64_t depth, float* out, int64_t pitch,
                      Feed& feed) {
  Float sums[R][V];
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Float{};
  }
  for (int64_t k = 0; k < depth;) {
    feed.fetch();
    for (const int64_t end = min64(depth, k + kStep); k < end; ++k) {
      Float value[V];
      CARERL_UNROLL
      for (int v = 0; v < V; ++v) value[v] = load(b + k * kPanel + v * kWidth);
      CARERL_UNROLL
      for (int r = 0; r < R; ++r) {
        const Float factor = splat(a[r * across + k]);
        CARERL_UNROLL
        for (int v = 0; v < V; ++v) sums[r][v] += factor * value[v];
      }
    }
  }
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) store(out + r * pitch + v * kWidth, load(out + r * pitch + v * kWidth) + sums[r][v]);
  }
}

// Rows [depth, n] of a matrix as floats in panels of columns, [panel, deep, kPanel] with deep >= depth, zeros behind.
template <class E>
static void load_panels(const typename E::Type* src, int64_t pitch, int64_t depth, int64_t n, int64_t deep,
                        float* dst) {
  for (int64_t row = 0; row < depth; ++row, src += pitch, dst += kPanel) {
    int64_t c = 0;
    for (; c + kPanel <= n; c += kPanel) {
      CARERL_UNROLL
      for (int v = 0; v < kPair; ++v) store(dst + c * deep + v * kWidth, E::load(src + c + v * kWidth));
    }
    if (c == n) continue;
    CARERL_UNROLL
    for (int v = 0; v < kPair; ++v) store(dst + c * deep + v * kWidth, Float{});
    load_plain<E>(src + c, dst + c * deep, n - c);
  }
}

// The directions as floats, converted into `converted` where they are not.
static const float* directions_of(const Input& in, float* converted) {
  if (in.direction_dtype == DType::kF32) return static_cast<const float*>(in.directions);
  load_plain<BF16>(static_cast<const uint16_t*>(in.directions), converted, in.count * in.inputs());
  return converted;
}

// ---------------------------------------------------------------------------------------------------- rows of outputs

// W[rows named, column...] = from + L b for R rows and two vectors of columns, of which n are there. `left` has a row
// for each of them; `from` are the rows as floats.
template <class E, int R>
static void edit_rows(const float* left, int64_t across, const float* b, int64_t depth, const float* from,
                      typename E::Type* w, int64_t pitch, const int32_t* names, int64_t n) {
  Float sums[R][kPair];
  multiply_strip<R, kPair>(left, across, 1, b, kPanel, depth, sums);
  if (n >= kPanel) {
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      CARERL_UNROLL
      for (int v = 0; v < kPair; ++v) {
        const int64_t at = names[r] * pitch + v * kWidth;
        store_as(E{}, w + at, load(from + at) + sums[r][v]);
      }
    }
    return;
  }
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int v = 0; v < kPair; ++v) {
      const int64_t at = names[r] * pitch + v * kWidth, there = min64(n - v * kWidth, kWidth);
      if (there <= 0) break;
      typename E::Type part[kWidth];
      store_as(E{}, part, load_some(from + at, there) + sums[r][v]);
      __builtin_memcpy(w + at, part, there * sizeof(*w));
    }
  }
}

// Without a rule coefficients go to `out`, else rows are edited by it.
template <class E>
static void input_rows(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule* rule, float* out,
                       double* energies) {
  constexpr bool kPlain = __is_same(E, F32);
  const int64_t n = in.columns, count = in.count, pitch = round_up(count, kPanel);
  const int64_t panels = pitch / kPanel, wide = round_up(n, kPanel);
  float* across = static_cast<float*>(scratch(
      (pitch * n + (rule == nullptr ? 0 : wide * count) + block * pitch + (kPlain ? 0 : block * n + kWidth)) *
          sizeof(float) +
      block * sizeof(int32_t) + (in.direction_dtype == DType::kF32 ? 0 : (count * n + kWidth) * sizeof(float))));
  float* along = across + pitch * n;
  float* products = along + (rule == nullptr ? 0 : wide * count);
  float* tile = products + block * pitch;
  int32_t* names = reinterpret_cast<int32_t*>(tile + (kPlain ? 0 : block * n + kWidth));
  const float* directions = directions_of(in, reinterpret_cast<float*>(names + block));
  pack_transposed(directions, count, n, across);                                 // [panel of directions, n, kPanel]
  if (rule != nullptr) load_panels<F32>(directions, n, count, n, count, along);  // [panel of columns, count, kPanel]
  typename E::Type* matrix = static_cast<typename E::Type*>(in.matrix);
  for (int64_t first = begin; first < end; first += block) {
    const int64_t rows = min64(block, end - first), following = min64(block, end - first - rows);
    typename E::Type* w = matrix + first * n;
    const float* from = tile;
    if constexpr (kPlain) {
      from = w;
    } else {
      load_plain<E>(w, tile, rows * n);
    }
    Feed feed;
    if (rule != nullptr) {
      const float* const each[] = {rule->anchor, rule->lower, rule->upper};
      for (const float* numbers : each) {
        if (numbers != nullptr) feed.add(numbers + first * count, rows * count * sizeof(float));
      }
    }
    feed.add(w + rows * n, following * n * sizeof(*w));
    feed.spread(rows / kTall * panels * (n / kStep));
    __builtin_memset(products, 0, rows * pitch * sizeof(float));
    for (int64_t k = 0; k < n; k += kShallow) {
      const int64_t depth = min64(kShallow, n - k);
      for (int64_t panel = 0; panel < panels; ++panel) {
        const float* b = across + (panel * n + k) * kPanel;
        const bool pair = count - panel * kPanel > kWidth;
        for_strips(rows, [&](auto r, int64_t row) {
          float* sums = products + row * pitch + panel * kPanel;
          if (pair) {
            add_panel<r.value, kPair>(from + row * n + k, n, b, depth, sums, pitch, feed);
          } else {
            add_panel<r.value, 1>(from + row * n + k, n, b, depth, sums, pitch, feed);
          }
        });
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
      if (moved < row) __builtin_memcpy(products + moved * pitch, x, count * sizeof(float));
      names[moved++] = static_cast<int32_t>(row);
    }
    *energies++ = energy.total();
    for (int64_t column = 0; moved > 0 && column < n; column += kPanel) {
      const float* b = along + column * count;
      for_strips(moved, [&](auto r, int64_t row) {
        edit_rows<E, r.value>(products + row * pitch, pitch, b, count, from + column, w + column, n, names + row,
                              n - column);
      });
    }
  }
}

// ------------------------------------------------------------------------------------------------- columns of outputs

// The columns of a panel that move, all of it as a rule: those that do not keep their bits.
template <class E, int R>
static void edit_columns(const float* left, int64_t across, const float* b, int64_t depth, typename E::Type* w,
                         int64_t pitch, int64_t n, const bool* moved, bool all) {
  Float sums[R][kPair];
  multiply_strip<R, kPair>(left, across, 1, b, kPanel, depth, sums);
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    typename E::Type* row = w + r * pitch;
    if (all && n >= kPanel) {
      CARERL_UNROLL
      for (int v = 0; v < kPair; ++v) store_as(E{}, row + v * kWidth, E::load(row + v * kWidth) + sums[r][v]);
      continue;
    }
    typename E::Type part[kPanel] = {};
    __builtin_memcpy(part, row, min64(n, kPanel) * sizeof(*row));
    CARERL_UNROLL
    for (int v = 0; v < kPair; ++v) store_as(E{}, part + v * kWidth, E::load(part + v * kWidth) + sums[r][v]);
    for (int64_t c = 0; c < min64(n, kPanel); ++c) {
      if (moved[c]) row[c] = part[c];
    }
  }
}

template <class E>
static void input_columns(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule* rule, float* out,
                          double* energies) {
  const int64_t m = in.rows, n = in.columns, count = in.count, pitch = round_up(count, kWidth);
  const int64_t width = round_up(block, kPanel);
  const bool plain = in.direction_dtype == DType::kF32;
  float* sums = static_cast<float*>(
      scratch((width * pitch + kShallow * width + kPanel * pitch + kShallow * pitch + (plain ? 0 : count * kShallow)) *
                  sizeof(float) +
              width * sizeof(bool)));            // [panel of columns, count, kPanel]
  float* tile = sums + width * pitch;            // [panel of columns, kShallow, kPanel] of W
  float* turned = tile + kShallow * width;       // [kPanel, pitch]: the coefficients of columns, one after another
  float* across = turned + kPanel * pitch;       // [kShallow, pitch]: directions, transposed
  float* converted = across + kShallow * pitch;  // [count, kShallow]
  bool* moved = reinterpret_cast<bool*>(converted + (plain ? 0 : count * kShallow));
  // Directions [count, depth] from an input on, and the elements between two of them.
  int64_t apart = m;
  auto directions = [&](int64_t k, int64_t depth) -> const float* {
    if (plain) return static_cast<const float*>(in.directions) + k;
    for (int64_t i = 0; i < count; ++i) {
      load_plain<BF16>(static_cast<const uint16_t*>(in.directions) + i * m + k, converted + i * kShallow, depth);
    }
    apart = kShallow;
    return converted;
  };
  typename E::Type* matrix = static_cast<typename E::Type*>(in.matrix);
  Feed nothing;  // rows of W come in long runs, which the hardware sees coming
  for (int64_t first = begin; first < end; first += block) {
    const int64_t columns = min64(block, end - first);
    __builtin_memset(sums, 0, width * pitch * sizeof(float));
    for (int64_t k = 0; k < m; k += kShallow) {
      const int64_t depth = min64(kShallow, m - k);
      const float* u = directions(k, depth);
      load_panels<E>(matrix + k * n + first, n, depth, columns, kShallow, tile);
      for (int64_t column = 0; column < columns; column += kPanel) {
        float* products = sums + column * count;
        for_strips(count, [&](auto r, int64_t row) {
          add_panel<r.value, kPair>(u + row * apart, apart, tile + column * kShallow, depth, products + row * kPanel,
                                    kPanel, nothing);
        });
      }
    }
    Energy energy;
    bool any = false;
    for (int64_t column = 0; column < columns; column += kPanel) {
      float* products = sums + column * count;
      const int64_t there = min64(kPanel, columns - column);
      if (pitch > count) __builtin_memset(turned, 0, kPanel * pitch * sizeof(float));
      transpose(products, kPanel, count, kPanel, turned, pitch);
      if (rule == nullptr) {
        for (int64_t c = 0; c < there; ++c) {
          __builtin_memcpy(out + (first + column + c) * count, turned + c * pitch, count * sizeof(float));
        }
        continue;
      }
      for (int64_t c = 0; c < kPanel; ++c) {
        float* x = turned + c * pitch;
        moved[column + c] = c < there && correct(*rule, first + column + c, count, x, energy);
        if (!moved[column + c]) __builtin_memset(x, 0, count * sizeof(float));
        any |= moved[column + c];
      }
      transpose(turned, pitch, kPanel, count, products, kPanel);
    }
    if (rule == nullptr) continue;
    *energies++ = energy.total();
    for (int64_t k = 0; any && k < m; k += kShallow) {
      const int64_t depth = min64(kShallow, m - k);
      const float* u = directions(k, depth);
      transpose(u, apart, count, depth, across, pitch);
      for (int64_t column = 0; column < columns; column += kPanel) {
        const int64_t there = min64(kPanel, columns - column);
        int64_t moving = 0;
        for (int64_t c = 0; c < there; ++c) moving += moved[column + c];
        if (moving == 0) continue;
        typename E::Type* w = matrix + k * n + first + column;
        for_strips(depth, [&](auto r, int64_t row) {
          edit_columns<E, r.value>(across + row * pitch, pitch, sums + column * count, count, w + row * n, n, there,
                                   moved + column, moving == there);
        });
      }
    }
  }
}

static void input_outputs(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule* rule, float* out,
                          double* energies) {
  with_gradient(in.dtype, [&](auto type) {
    using E = decltype(type);
    (in.left ? input_columns<E> : input_rows<E>)(in, begin, end, block, rule, out, energies);
  });
}

// As many outputs as fit L2, and enough to use directions in L1 some times.
static int64_t input_block(const Input& in) {
  const int64_t fit = (int64_t{512} << 10) / (4 * (in.inputs() > 0 ? in.inputs() : 1));
  const int64_t most = in.left ? 256 : 96, least = in.left ? 128 : 24, unit = in.left ? 64 : 24;
  const int64_t block = fit / unit * unit;
  return block < least ? least : min64(block, most);
}

static void input_project(const Input& in, int64_t begin, int64_t end, int64_t block, float* out) {
  input_outputs(in, begin, end, block, nullptr, out, nullptr);
}

static void input_edit(const Input& in, int64_t begin, int64_t end, int64_t block, const InputRule& rule,
                       double* energies) {
  input_outputs(in, begin, end, block, &rule, nullptr, energies);
}

}  // namespace carerl::cpu::CARERL_ISA
