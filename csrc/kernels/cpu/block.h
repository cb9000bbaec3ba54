// Two-sided block directions of weight matrices: coefficients U_d^T W V_d of every domain d, and W <- W + sum_d U_d X_d
// V_d^T. Thin products over all domains' columns at once, so that W passes through the caches once.
#pragma once

#include "tile.h"
#include "transpose.h"

namespace carerl::cpu::CARERL_ISA {

constexpr int kStrip = 6;        // rows of W side by side: 12 sums, 2 operands and 1 factor of AVX2's 16 registers
constexpr int kPair = 2;         // vectors of columns
constexpr int64_t kDepth = 320;  // products summed in registers: 20 KiB of an operand stay in L1
constexpr int64_t kBlockBytes = 96 << 10;  // rows of W that pass through L2 together
constexpr int64_t kMostStrips = 16;

// sums[r] = sum_k a[r * across + k * along] b[k * pitch] over k < depth, V vectors each
template <int R, int V>
CARERL_INLINE void multiply_strip(const float* a, int64_t across, int64_t along, const float* b, int64_t pitch,
                                  int64_t depth, Float (&sums)[R][V]) {
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) sums[r][v] = Float{};
  }
  for (int64_t k = 0; k < depth; ++k) {
    Float value[V];
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) value[v] = load(b + k * pitch + v * kWidth);
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      const Float factor = splat(a[r * across + k * along]);
      CARERL_UNROLL
      for (int v = 0; v < V; ++v) sums[r][v] += factor * value[v];
    }
  }
}

// f(Constant<R>{}) for R rows, at most kStrip
template <class F>
CARERL_INLINE void with_rows(int64_t rows, const F& f) {
  switch (rows) {
    case 1:
      return f(Constant<1>{});
    case 2:
      return f(Constant<2>{});
    case 3:
      return f(Constant<3>{});
    case 4:
      return f(Constant<4>{});
    case 5:
      return f(Constant<5>{});
    default:
      return f(Constant<kStrip>{});
  }
}

// out[r] += sum_k a[r * across + k] b[k], b packed as [depth, V vectors]
template <int R, int V>
static void add_product(const float* a, int64_t across, const float* b, int64_t depth, float* out, int64_t pitch) {
  Float sums[R][V];
  multiply_strip<R, V>(a, across, 1, b, V * kWidth, depth, sums);
  CARERL_UNROLL
  for (int r = 0; r < R; ++r) {
    CARERL_UNROLL
    for (int v = 0; v < V; ++v) store(out + r * pitch + v * kWidth, load(out + r * pitch + v * kWidth) + sums[r][v]);
  }
}

static void add_product(int64_t rows, bool pair, const float* a, int64_t across, const float* b, int64_t depth,
                        float* out, int64_t pitch) {
  with_rows(rows, [&](auto r) {
    if (pair) {
      add_product<r.value, kPair>(a, across, b, depth, out, pitch);
    } else {
      add_product<r.value, 1>(a, across, b, depth, out, pitch);
    }
  });
}

// Rows of q floats as panels of two vectors of columns, the last one perhaps of one, zeros behind: [panel, rows, ...].
static void pack_panels(const float* src, int64_t rows, int64_t q, float* dst) {
  for (int64_t c = 0; c < q; c += kPair * kWidth) {
    const int64_t width = q - c > kWidth ? kPair * kWidth : kWidth, n = min64(width, q - c);
    for (int64_t row = 0; row < rows; ++row, dst += width) {
      if (n == width) {
        for (int64_t i = 0; i < width; i += kWidth) store(dst + i, load(src + row * q + c + i));
      } else {
        for (int64_t i = 0; i < width; ++i) dst[i] = i < n ? src[row * q + c + i] : 0.0f;
      }
    }
  }
}

// The transpose of n rows of q floats as panels of two vectors of columns, zeros behind: [panel, q, ...].
static void pack_transposed(const float* src, int64_t n, int64_t q, float* dst) {
  constexpr int64_t width = kPair * kWidth;
  for (int64_t c = 0; c < n; c += width, dst += q * width) {
    int64_t k = 0;
#if defined(CARERL_AVX2) || defined(CARERL_AVX512)
    for (; c + width <= n && k + 8 <= q; k += 8) {
      for (int64_t j = 0; j < width; j += 8) transpose8(src + (c + j) * q + k, q, dst + k * width + j, width);
    }
#endif
    for (; k < q; ++k) {
      for (int64_t j = 0; j < width; ++j) dst[k * width + j] = c + j < n ? src[(c + j) * q + k] : 0.0f;
    }
  }
}

// Asks for bytes that come next, a part at each fetch().
class Upcoming {
 public:
  Upcoming(const void* p, int64_t bytes, int64_t parts)
      : p_(static_cast<const char*>(p)), end_(p_ + bytes), share_((bytes / parts / 64 + 1) * 64) {}
  void fetch() {
    const char* stop = end_ - p_ > share_ ? p_ + share_ : end_;
    for (; p_ < stop; p_ += 64) __builtin_prefetch(p_, 0, 2);
  }

 private:
  const char *p_, *end_;
  int64_t share_;
};

// How the rows of a matrix are gone through.
struct BlockShape {
  int64_t q, padded, rows, chunks, depth;  // columns of all factors, in whole vectors; rows at a time; depth at a time
  explicit BlockShape(const Block& block) : q(block.domains * block.rank), padded(round_up(q, kWidth)) {
    const int64_t strips = kBlockBytes / (block.columns * 4 * kStrip);
    rows = kStrip * (strips < 1 ? 1 : min64(strips, kMostStrips));
    chunks = (block.columns + kDepth - 1) / kDepth;
    depth = (block.columns + chunks - 1) / chunks;
  }
};

// totals[d] += U_d^T P_d for a few rows of both, summed in fp32, [rank, rank] each
static void add_coefficients(const Block& block, const BlockShape& shape, int64_t first, int64_t rows,
                             const float* products, double* totals) {
  const float* left = block.left + first * shape.q;
  for (int64_t d = 0; d < block.domains; ++d, totals += block.rank * block.rank) {
    for (int64_t i = 0; i < block.rank; i += kStrip) {
      for (int64_t j = 0; j < block.rank; j += kPair * kWidth) {
        const int64_t column = d * block.rank, n = min64(block.rank - j, kPair * kWidth);
        with_rows(min64(block.rank - i, kStrip), [&](auto r) {
          float out[r.value][kPair * kWidth];
          Float sums[r.value][kPair];
          multiply_strip<r.value, kPair>(left + column + i, 1, shape.q, products + column + j, shape.padded, rows,
                                         sums);
          CARERL_UNROLL
          for (int r_ = 0; r_ < r.value; ++r_) {
            CARERL_UNROLL
            for (int v = 0; v < kPair; ++v) store(&out[r_][v * kWidth], sums[r_][v]);
            for (int64_t c = 0; c < n; ++c) totals[(i + r_) * block.rank + j + c] += static_cast<double>(out[r_][c]);
          }
        });
      }
    }
  }
}

template <class E>
static void block_project_stored(const Block& block, int64_t begin, int64_t end, double* totals) {
  const BlockShape shape(block);
  const int64_t n = block.columns, panels = (shape.padded / kWidth + kPair - 1) / kPair;
  const int64_t slack = kPair * kWidth;  // read, never used, where a rank is no whole number of vectors
  const int64_t tile_size = __is_same(E, F32) ? 0 : shape.rows * shape.depth;
  float* packed =
      static_cast<float*>(scratch((n * shape.padded + shape.rows * shape.padded + slack + tile_size) * sizeof(float)));
  float* products = packed + n * shape.padded;
  float* tile = products + shape.rows * shape.padded + slack;
  pack_panels(block.right, n, shape.q, packed);
  for (int64_t i = 0; i < slack; ++i) products[shape.rows * shape.padded + i] = 0.0f;
  const typename E::Type* matrix = static_cast<const typename E::Type*>(block.matrix);
  for (int64_t first = begin; first < end; first += shape.rows) {
    const int64_t rows = min64(shape.rows, end - first), following = min64(shape.rows, end - first - rows);
    Upcoming upcoming(matrix + (first + rows) * n, following * n * sizeof(*matrix),
                      shape.chunks * panels * ((rows + kStrip - 1) / kStrip));
    __builtin_memset(products, 0, rows * shape.padded * sizeof(float));
    for (int64_t k = 0; k < n; k += shape.depth) {
      const int64_t depth = min64(shape.depth, n - k);
      const float* a = tile;
      int64_t across = shape.depth;
      if constexpr (__is_same(E, F32)) {
        a = matrix + first * n + k;
        across = n;
      } else {
        for (int64_t row = 0; row < rows; ++row) {
          load_plain<E>(matrix + (first + row) * n + k, tile + row * across, depth);
        }
      }
      for (int64_t c = 0; c < shape.padded; c += kPair * kWidth) {
        const bool pair = shape.padded - c > kWidth;
        const float* panel = packed + c * n + k * (pair ? kPair * kWidth : kWidth);
        for (int64_t row = 0; row < rows; row += kStrip) {
          add_product(min64(kStrip, rows - row), pair, a + row * across, across, panel, depth,
                      products + row * shape.padded + c, shape.padded);
          upcoming.fetch();
        }
      }
    }
    add_coefficients(block, shape, first, rows, products, totals);
  }
}

static void block_project(const Block& block, int64_t begin, int64_t end, double* totals) {
  with_gradient(block.dtype, [&](auto type) { block_project_stored<decltype(type)>(block, begin, end, totals); });
}

// W[row..., columns] += L b for R rows and two vectors of columns, of which n are there
template <class E, int R>
static void edit_strip(const float* left, int64_t across, const float* b, int64_t depth, typename E::Type* w,
                       int64_t pitch, int64_t n) {
  Float sums[R][kPair];
  multiply_strip<R, kPair>(left, across, 1, b, kPair * kWidth, depth, sums);
  if (n >= kPair * kWidth) {
    CARERL_UNROLL
    for (int r = 0; r < R; ++r) {
      CARERL_UNROLL
      for (int v = 0; v < kPair; ++v) {
        typename E::Type* at = w + r * pitch + v * kWidth;
        store_as(E{}, at, E::load(at) + sums[r][v]);
      }
    }
    return;
  }
  for (int r = 0; r < R; ++r) {
    typename E::Type part[kPair * kWidth] = {};
    __builtin_memcpy(part, w + r * pitch, n * sizeof(*w));
    CARERL_UNROLL
    for (int v = 0; v < kPair; ++v) store_as(E{}, part + v * kWidth, E::load(part + v * kWidth) + sums[r][v]);
    __builtin_memcpy(w + r * pitch, part, n * sizeof(*w));
  }
}

template <class E>
static void block_edit_stored(const Block& block, int64_t begin, int64_t end, const float* mix) {
  const BlockShape shape(block);
  const int64_t n = block.columns, r = block.rank, panels = (n + kPair * kWidth - 1) / (kPair * kWidth);
  const int64_t mix_size = r * round_up(r, kWidth), across = shape.padded + kPair * kWidth;
  float* packed = static_cast<float*>(
      scratch((panels * kPair * kWidth * shape.q + block.domains * mix_size + shape.rows * across) * sizeof(float)));
  float* mixes = packed + panels * kPair * kWidth * shape.q;
  float* left = mixes + block.domains * mix_size;  // U X of all domains side by side
  pack_transposed(block.right, n, shape.q, packed);
  for (int64_t d = 0; d < block.domains; ++d) pack_panels(mix + d * r * r, r, r, mixes + d * mix_size);
  typename E::Type* matrix = static_cast<typename E::Type*>(block.matrix);
  for (int64_t first = begin; first < end; first += shape.rows) {
    const int64_t rows = min64(shape.rows, end - first), following = min64(shape.rows, end - first - rows);
    Upcoming upcoming(matrix + (first + rows) * n, following * n * sizeof(*matrix),
                      panels * ((rows + kStrip - 1) / kStrip));
    __builtin_memset(left, 0, rows * across * sizeof(float));
    for (int64_t d = 0; d < block.domains; ++d) {
      for (int64_t c = 0; c < r; c += kPair * kWidth) {
        for (int64_t row = 0; row < rows; row += kStrip) {
          add_product(min64(kStrip, rows - row), r - c > kWidth, block.left + (first + row) * shape.q + d * r, shape.q,
                      mixes + d * mix_size + c * r, r, left + row * across + d * r + c, across);
        }
      }
    }
    for (int64_t panel = 0; panel < panels; ++panel) {
      const int64_t column = panel * kPair * kWidth;
      for (int64_t row = 0; row < rows; row += kStrip) {
        with_rows(min64(kStrip, rows - row), [&](auto count) {
          edit_strip<E, count.value>(left + row * across, across, packed + column * shape.q, shape.q,
                                     matrix + (first + row) * n + column, n, n - column);
        });
        upcoming.fetch();
      }
    }
  }
}

static void block_edit(const Block& block, int64_t begin, int64_t end, const float* mix) {
  with_gradient(block.dtype, [&](auto type) { block_edit_stored<decltype(type)>(block, begin, end, mix); });
}

}  // namespace carerl::cpu::CARERL_ISA
