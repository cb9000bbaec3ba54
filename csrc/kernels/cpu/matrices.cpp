#include "matrices.h"

#include <algorithm>
#include <atomic>
#include <cmath>

#include "select.h"

namespace carerl::cpu {
namespace {

// body(begin, end) for contiguous shares of [0, count), one per thread.
template <class Body>
void for_shares(int64_t count, int64_t threads, const Pool& pool, const Body& body) {
  struct Context {
    const Body& body;
    int64_t count, threads;
  } context{body, count, std::min<int64_t>({threads, count, pool.threads})};
  auto work = [](void* raw, int thread) {
    const Context& c = *static_cast<Context*>(raw);
    c.body(c.count * thread / c.threads, c.count * (thread + 1) / c.threads);
  };
  if (context.threads > 1) return pool.run(static_cast<int>(context.threads), work, &context);
  body(0, count);
}

// body(i) for every i in [0, count).
template <class Body>
void for_each(int64_t count, int64_t threads, const Pool& pool, const Body& body) {
  for_shares(count, threads, pool, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(i);
  });
}

// How matrices are cut into pieces of rows; a function of their shape alone, so that sums do not depend on the threads.
struct Pieces {
  int64_t rows, per_matrix, threads;

  explicit Pieces(const Blocks& b) {
    const int64_t least =
        (int64_t{1} << 19) / std::max<int64_t>(b.columns, 1) + 1;  // elements that are worth packing V
    rows = (std::max(least, (b.rows + 63) / 64) + 95) / 96 * 96;
    per_matrix = b.columns * b.domains * b.rank == 0 ? 0 : (b.rows + rows - 1) / rows;
    const int64_t work = static_cast<int64_t>(b.matrices.size()) * b.rows * b.columns * b.domains * b.rank;
    threads = 1 + work / (int64_t{1} << 19);  // 10 us of one core: waking the pool costs 3 to 5
  }

  template <class Body>
  void run(const Blocks& blocks, const Body& body) const {
    const int64_t q = blocks.domains * blocks.rank;
    for_each(static_cast<int64_t>(blocks.matrices.size()) * per_matrix, threads, blocks.pool, [&](int64_t piece) {
      const int64_t g = piece / per_matrix, begin = piece % per_matrix * rows;
      const Block block{blocks.matrices[g],
                        blocks.left + g * blocks.rows * q,
                        blocks.right + g * blocks.columns * q,
                        blocks.rows,
                        blocks.columns,
                        blocks.domains,
                        blocks.rank,
                        blocks.dtype};
      body(block, g, piece, begin, std::min(begin + rows, blocks.rows));
    });
  }
};

// body(input, matrix, begin, end, block, first block): outputs [begin, end) of one matrix. A thread has as many of them
// as it can, since it packs the directions of each matrix once.
template <class Body>
void for_outputs(const Inputs& inputs, const Body& body) {
  Input in = inputs.first;
  const int64_t block = kernels().input_block(in), outputs = in.outputs(), blocks = (outputs + block - 1) / block;
  const int64_t matrices = inputs.matrices.size(), work = matrices * in.rows * in.columns * in.count;
  const int64_t bytes = in.count * in.inputs() * element_size(in.direction_dtype);
  for_shares(matrices * blocks, 1 + work / (int64_t{1} << 19), inputs.pool, [&](int64_t begin, int64_t end) {
    for (int64_t at = begin; at < end;) {
      const int64_t g = at / blocks, first = at % blocks, last = std::min(blocks, first + end - at);
      Input own = in;
      own.matrix = inputs.matrices[g];
      own.directions = static_cast<const char*>(in.directions) + g * bytes;
      body(own, g, first * block, std::min(last * block, outputs), block, at);
      at += last - first;
    }
  });
}

}  // namespace

void block_project(const Blocks& blocks, double* out) {
  const Pieces pieces(blocks);
  const int64_t values = blocks.domains * blocks.rank * blocks.rank, count = blocks.matrices.size();
  std::vector<double> totals(count * pieces.per_matrix * values, 0.0);
  pieces.run(blocks, [&](const Block& block, int64_t, int64_t piece, int64_t begin, int64_t end) {
    kernels().block_project(block, begin, end, totals.data() + piece * values);
  });
  std::fill_n(out, count * values, 0.0);
  for (int64_t piece = 0; piece < count * pieces.per_matrix; ++piece) {
    double* sum = out + piece / pieces.per_matrix * values;
    for (int64_t i = 0; i < values; ++i) sum[i] += totals[piece * values + i];
  }
}

void block_edit(const Blocks& blocks, const float* mix) {
  const int64_t values = blocks.domains * blocks.rank * blocks.rank;
  Pieces(blocks).run(blocks, [&](const Block& block, int64_t g, int64_t, int64_t begin, int64_t end) {
    const float *first = mix + g * values, *last = first + values;
    const bool finite = std::all_of(first, last, [](float x) { return std::isfinite(x); });
    const bool moves = std::any_of(first, last, [](float x) { return x != 0.0f; });
    if (finite && moves) kernels().block_edit(block, begin, end, first);
  });
}

void input_project(const Inputs& inputs, float* out) {
  if (inputs.first.count == 0) return;
  for_outputs(inputs, [&](const Input& in, int64_t g, int64_t begin, int64_t end, int64_t block, int64_t) {
    kernels().input_project(in, begin, end, block, out + g * in.outputs() * in.count);
  });
}

void input_edit(const Inputs& inputs, const InputRule& rule, double* energies) {
  const Input& first = inputs.first;
  const int64_t block = kernels().input_block(first), blocks = (first.outputs() + block - 1) / block;
  const int64_t matrices = inputs.matrices.size();
  std::vector<double> parts(matrices * blocks, 0.0);
  if (first.count > 0) {
    for_outputs(inputs, [&](const Input& in, int64_t g, int64_t begin, int64_t end, int64_t block, int64_t part) {
      const int64_t skipped = g * in.outputs() * in.count;
      InputRule own = rule;
      for (const float** numbers : {&own.anchor, &own.lower, &own.upper}) {
        if (*numbers != nullptr) *numbers += skipped;
      }
      kernels().input_edit(in, begin, end, block, own, parts.data() + part);
    });
  }
  for (int64_t g = 0; g < matrices; ++g) {
    energies[g] = 0.0;
    for (int64_t i = g * blocks; i < (g + 1) * blocks; ++i) energies[g] += parts[i];
  }
}

void packed_times(const float* packed, int64_t matrices, int64_t size, int64_t vectors, const double* x, double* out,
                  const Pool& pool) {
  const int64_t area = size * (size + 1) / 2;
  for_each(matrices, 1 + matrices * area / (int64_t{1} << 15), pool, [&](int64_t g) {
    std::vector<double> memory(2 * vectors * size);
    double *in = memory.data(), *result = in + vectors * size;
    for (int64_t v = 0; v < vectors; ++v) std::copy_n(x + (v * matrices + g) * size, size, in + v * size);
    kernels().packed_times(packed + g * area, size, vectors, in, result);
    for (int64_t v = 0; v < vectors; ++v) std::copy_n(result + v * size, size, out + (v * matrices + g) * size);
  });
}

bool all_finite(const std::vector<Numbers>& numbers, const Pool& pool) {
  // Stretches of 1 MiB at most: many small tensors and one large one are shared out alike.
  struct Stretch {
    const char* data;
    int64_t n, bytes;
    uint64_t exponent;
  };
  std::vector<Stretch> stretches;
  int64_t total = 0;
  for (const Numbers& part : numbers) {
    const int64_t step = (int64_t{1} << 20) / part.bytes;
    total += part.n * part.bytes;
    for (int64_t begin = 0; begin < part.n; begin += step) {
      stretches.push_back({static_cast<const char*>(part.data) + begin * part.bytes, std::min(step, part.n - begin),
                           part.bytes, part.exponent});
    }
  }
  std::atomic<bool> finite{true};
  for_each(static_cast<int64_t>(stretches.size()), 1 + total / (int64_t{1} << 18), pool, [&](int64_t i) {
    const Stretch& s = stretches[i];
    if (!kernels().finite(s.data, s.n, s.bytes, s.exponent)) finite.store(false, std::memory_order_relaxed);
  });
  return finite.load();
}

}  // namespace carerl::cpu
