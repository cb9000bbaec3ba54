#include "ops.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>
#include <string>

#include "isa.h"
#include "plan.h"
#include "select.h"

namespace carerl::cpu {

namespace generic {
extern const KernelTable table;
}
#if defined(__x86_64__)
namespace avx2 {
extern const KernelTable table;
}
namespace avx512 {
extern const KernelTable table;
}
namespace avx512_bf16 {
const KernelTable& table();
}
namespace amx_bf16 {
const KernelTable& table();
}
#endif

namespace {

const KernelTable& choose() {
#if defined(__x86_64__)
  const std::string name = select_isa();
  if (name == "amx_bf16") return amx_bf16::table();
  if (name == "avx512_bf16") return avx512_bf16::table();
  if (name == "avx512") return avx512::table;
  if (name == "avx2") return avx2::table;
#else
  select_isa();
#endif
  return generic::table;
}

}  // namespace

const KernelTable& kernels() {
  static const KernelTable& table = choose();
  return table;
}

namespace {

// Totals of all slots, and their sum per group.
class Totals {
 public:
  Totals(const Call& call, const Plan& plan, int64_t values)
      : call_(call), plan_(plan), values_(values), memory_(plan.slot_count() * values, 0.0) {}

  double* of(const Piece& piece) { return memory_.data() + piece.slot * values_; }

  void add_up(double* out) const {
    std::fill_n(out, call_.groups() * values_, 0.0);
    for (int64_t slot = 0; slot < plan_.slot_count(); ++slot) {
      const int64_t group = call_.per_tensor ? plan_.pieces[plan_.slots[slot]].span : 0;
      const double* part = memory_.data() + slot * values_;
      for (int64_t i = 0; i < values_; ++i) out[group * values_ + i] += part[i];
    }
  }

 private:
  const Call& call_;
  const Plan& plan_;
  int64_t values_;
  std::vector<double> memory_;
};

// The part of a per-tensor argument that belongs to a piece; a batch and a summed list have one part.
template <class T>
const T* part(const Call& call, const Piece& piece, const T* all, int64_t size) {
  return call.per_tensor ? all + piece.span * size : all;
}

void project_planned(const Call& call, const Plan& plan, double* coefficients) {
  Totals totals(call, plan, call.batch() * call.basis.rows);
  for_each_piece(call, plan,
                 [&](const Piece& piece) { kernels().project(call.basis, span_of(call, piece), totals.of(piece)); });
  totals.add_up(coefficients);
}

void edit_planned(const Call& call, const Plan& plan, const float* mix, const float* scale) {
  for_each_piece(call, plan, [&](const Piece& piece) {
    kernels().edit(call.basis, span_of(call, piece),
                   Edit{part(call, piece, mix, call.basis.rows), part(call, piece, scale, 1)});
  });
}

// y = R x for a row-major R; four partial sums, so that the additions overlap.
template <class T>
void multiply(const T* root, const double* x, double* y, int64_t k) {
  for (int64_t i = 0; i < k; ++i, root += k) {
    double sums[4] = {};
    int64_t j = 0;
    for (; j + 4 <= k; j += 4) {
      for (int lane = 0; lane < 4; ++lane) sums[lane] += static_cast<double>(root[j + lane]) * x[j + lane];
    }
    for (; j < k; ++j) sums[0] += static_cast<double>(root[j]) * x[j];
    y[i] = (sums[0] + sums[1]) + (sums[2] + sums[3]);
  }
}

// linalg.dacsp_core for one gradient: classes from the raw coefficients, weights applied in the frame R c.
void classify(const Rule& rule, int64_t k, const double* c, int64_t group, int8_t* classes, float* mix) {
  std::vector<double> memory(3 * k);
  double *gain = memory.data(), *frame = gain + k, *x = frame + k;
  // A weight tensor is fp32 and so is its difference to 1, as in the reference.
  auto excess = [](const Weights& w, int64_t i) {
    return w.rows ? static_cast<double>(w.rows[i] - 1.0f) : w.value - 1.0;
  };
  for (int64_t i = 0; i < k; ++i) {
    const double threshold = rule.threshold.rows ? static_cast<double>(rule.threshold.rows[i]) : rule.threshold.value;
    const bool positive = c[i] > threshold, negative = c[i] < -threshold;
    classes[i] = static_cast<int8_t>(positive - negative);
    gain[i] = negative ? excess(rule.conflict, i) : positive ? excess(rule.aligned, i) : 0.0;
  }
  auto rotated = [&](const double* in, double* out) {
    if (rule.root == nullptr) {
      std::copy_n(in, k, out);
    } else if (rule.root_is_double) {
      multiply(static_cast<const double*>(rule.root) + group * k * k, in, out, k);
    } else {
      multiply(static_cast<const float*>(rule.root) + group * k * k, in, out, k);
    }
  };
  rotated(c, frame);
  for (int64_t i = 0; i < k; ++i) gain[i] *= frame[i];
  rotated(gain, x);
  for (int64_t i = 0; i < k; ++i) mix[i] = static_cast<float>(x[i]);
}

}  // namespace

const char* isa() { return kernels().name; }

void project(const Call& call, double* coefficients) {
  project_planned(call, make_plan(call, call.batch() * call.basis.rows, call.per_tensor), coefficients);
}

void gram(const Call& call, double* out) {
  const int64_t size = call.basis.rows + call.batch();
  const Plan plan = make_plan(call, size * size, call.per_tensor);
  Totals totals(call, plan, size * size);
  for_each_piece(call, plan,
                 [&](const Piece& piece) { kernels().gram(call.basis, span_of(call, piece), totals.of(piece)); });
  totals.add_up(out);
  for (int64_t group = 0; group < call.groups(); ++group, out += size * size) {
    for (int64_t i = 0; i < size; ++i) {
      for (int64_t j = 0; j < i; ++j) out[i * size + j] = out[j * size + i];
    }
  }
}

void edit(const Call& call, const float* mix, const float* scale) {
  edit_planned(call, make_plan(call, 1, false), mix, scale);
}

void rotate(const Call& call, const Rotation& rotation) {
  const int64_t size = rotation.rows * (call.basis.rows + call.batch());
  for_each_piece(call, make_plan(call, 1, false), [&](const Piece& piece) {
    kernels().rotate(call.basis, span_of(call, piece),
                     Rotation{part(call, piece, rotation.q, size), rotation.rows, rotation.seed});
  });
}

void edit_rotate(const Call& call, const Basis& domain, const float* mix, const float* scale,
                 const Rotation& rotation) {
  const int64_t size = rotation.rows * (domain.rows + call.batch());
  for_each_piece(call, make_plan(call, 1, false), [&](const Piece& piece) {
    kernels().edit_rotate(call.basis, domain, span_of(call, piece),
                          Edit{part(call, piece, mix, call.basis.rows), part(call, piece, scale, 1)},
                          Rotation{part(call, piece, rotation.q, size), rotation.rows, rotation.seed});
  });
}

void dacsp(const Call& call, const Rule& rule, float* coefficients, int8_t* classes) {
  const int64_t k = call.basis.rows, count = call.groups() * call.batch();
  // One plan for both passes: a thread edits what it has just read.
  const Plan plan = make_plan(call, call.batch() * k, call.per_tensor);
  std::vector<double> c(count * k);
  project_planned(call, plan, c.data());
  std::vector<float> mix(count * k);
  const std::vector<float> scale(count, 1.0f);
  for (int64_t i = 0; i < count; ++i) {
    classify(rule, k, c.data() + i * k, call.per_tensor ? i : 0, classes + i * k, mix.data() + i * k);
  }
  std::transform(c.begin(), c.end(), coefficients, [](double value) { return static_cast<float>(value); });
  edit_planned(call, plan, mix.data(), scale.data());
}

void quantize(const Basis& basis, int64_t block, DType to, uint8_t* codes, float* scales, const Pool& pool) {
  // Stretches of whole blocks of one row; every element of the result is written by one of them.
  const int64_t stretch = std::max<int64_t>(block, (1 << 16) / block * block);
  const int64_t per_row = (basis.stride + stretch - 1) / stretch, blocks = (basis.stride + block - 1) / block;
  struct Context {
    const Basis& basis;
    int64_t block, stretch, per_row, blocks, threads;
    DType to;
    uint8_t* codes;
    float* scales;
  } context{basis, block, stretch, per_row, blocks, 1, to, codes, scales};
  auto work = [](void* raw, int thread) {
    const Context& c = *static_cast<Context*>(raw);
    const int64_t total = c.basis.rows * c.per_row;
    for (int64_t i = total * thread / c.threads; i < total * (thread + 1) / c.threads; ++i) {
      const int64_t row = i / c.per_row, begin = i % c.per_row * c.stretch;
      const int64_t first = row * c.basis.stride + begin;
      kernels().quantize(static_cast<const char*>(c.basis.data) + first * element_size(c.basis.dtype), c.basis.dtype,
                         std::min(c.stretch, c.basis.stride - begin), c.block, c.to, c.codes + first,
                         c.scales + row * c.blocks + begin / c.block);
    }
  };
  if (basis.rows * per_row < 2) return work(&context, 0);
  context.threads = std::min<int64_t>(pool.threads, basis.rows * per_row);
  pool.run(static_cast<int>(context.threads), work, &context);
}

namespace {

// body(row) for every row, in one contiguous share per thread.
template <class Body>
void for_each_row(int64_t rows, const Pool& pool, const Body& body) {
  struct Context {
    const Body& body;
    int64_t rows, threads;
  } context{body, rows, std::min<int64_t>(pool.threads, rows)};
  auto work = [](void* raw, int thread) {
    const Context& c = *static_cast<Context*>(raw);
    for (int64_t row = c.rows * thread / c.threads; row < c.rows * (thread + 1) / c.threads; ++row) c.body(row);
  };
  if (context.threads > 1) return pool.run(static_cast<int>(context.threads), work, &context);
  if (rows > 0) work(&context, 0);
}

}  // namespace

void token_logprobs(const Logits& logits, const LogProbs& out, const Pool& pool) {
  for_each_row(logits.rows, pool, [&](int64_t row) { kernels().logprobs(logits, row, out); });
}

void token_logprobs_backward(const Logits& logits, const LogProbs& forward, const LogProbsGradient& gradient,
                             const Pool& pool) {
  for_each_row(logits.rows, pool, [&](int64_t row) { kernels().logprobs_backward(logits, row, forward, gradient); });
}

}  // namespace carerl::cpu
