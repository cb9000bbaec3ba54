// The ops of torch.ops.carerl on CPU tensors. LibTorch stable ABI only, so that one binary loads in every torch from
// 2.10 on.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "../kernels/cpu/matrices.h"
#include "bindings.h"
#include "pool.h"

namespace carerl {
namespace {

struct Cpu {
  struct Context {
    explicit Context(const Tensor&) {}
    Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) const { return carerl::empty(sizes, dtype); }
  };
  using Call = cpu::Call;

  static Call call(const Gradients& grads, const Basis& basis, const Context&) {
    Call call{basis, {}, grads.per_tensor(), pool()};
    call.spans.reserve(grads.parts.size());
    for (const Gradients::Part& part : grads.parts) {
      call.spans.push_back({part.data, grads.stride, grads.batch, grads.dtype, part.column, part.length});
    }
    return call;
  }
  static cpu::Inputs inputs(const List& matrices, const Tensor& directions, bool left, const Context&) {
    const cpu::Input first{nullptr, directions.data_ptr(), matrices[0].size(0), matrices[0].size(1), directions.size(1),
                           left,    dtype_of(matrices[0]), dtype_of(directions)};
    return {pointers(matrices), first, pool()};
  }

  static void project(const char*, const Call& call, double* out) { cpu::project(call, out); }
  static void project(const char*, const Call& call, float* out) {
    std::vector<double> totals(call.groups() * call.batch() * call.basis.rows);
    cpu::project(call, totals.data());
    std::transform(totals.begin(), totals.end(), out, [](double x) { return static_cast<float>(x); });
  }
  static void gram(const char*, const Call& call, double* out) { cpu::gram(call, out); }
  static void edit(const char*, const Call& call, const Edit& change) { cpu::edit(call, change.mix, change.scale); }
  static void rotate(const char*, const Call& call, const float* q, int64_t rows, int64_t seed) {
    cpu::rotate(call, {q, rows, seed});
  }
  static void edit_rotate(const char*, const Call& call, const Basis& domain, const Edit& change, const float* q,
                          int64_t rows, int64_t seed) {
    cpu::edit_rotate(call, domain, change.mix, change.scale, {q, rows, seed});
  }
  static void dacsp(const char*, const Call& call, const Rule& rule, float* coefficients, int8_t* classes) {
    cpu::dacsp(call, rule, coefficients, classes);
  }
  static void quantize(const char*, const Basis& basis, int64_t block, DType to, uint8_t* codes, float* scales,
                       const Context&) {
    cpu::quantize(basis, block, to, codes, scales, pool());
  }
  static void input_project(const char*, const cpu::Inputs& inputs, float* out) { cpu::input_project(inputs, out); }
  static void input_edit(const char*, const cpu::Inputs& inputs, const InputRule& rule, double* energies) {
    cpu::input_edit(inputs, rule, energies);
  }
  static void token_logprobs(const char*, const Logits& logits, const LogProbs& out, const Context&) {
    cpu::token_logprobs(logits, out, pool());
  }
  static void token_logprobs_backward(const char*, const Logits& logits, const LogProbs& forward,
                                      const LogProbsGradient& gradient, const Context&) {
    cpu::token_logprobs_backward(logits, forward, gradient, pool());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carerl, CPU, m) { add_ops<Cpu>(m); }

}  // namespace carerl
