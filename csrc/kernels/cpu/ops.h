// The ops over a whole call: cuts it into pieces, runs the kernels on them in parallel, adds up in a fixed order.
// Knows nothing of torch: tensors come as pointers, the thread pool as a function.
#pragma once

#include <cstdint>
#include <vector>

#include "types.h"

namespace carerl::cpu {

// Runs body(context, i) for every i in [0, count), on up to `threads` threads.
struct Pool {
  int threads;
  void (*run)(int count, void (*body)(void* context, int i), void* context);
};

// What one call works on: a batch of gradients over one span, or the tensors of a list (batch 1 each).
struct Call {
  Basis basis;
  std::vector<Span> spans;
  bool per_tensor = false;
  Pool pool;

  int64_t batch() const { return spans.front().batch; }
  int64_t groups() const { return per_tensor ? static_cast<int64_t>(spans.size()) : 1; }
};

// Results have groups() * batch() leading entries. mix, scale and q of a list have one entry, or one per tensor.
void project(const Call& call, double* coefficients);
void gram(const Call& call, double* out);
void edit(const Call& call, const float* mix, const float* scale);
void rotate(const Call& call, const Rotation& rotation);
void edit_rotate(const Call& call, const Basis& domain, const float* mix, const float* scale, const Rotation& rotation);
void dacsp(const Call& call, const Rule& rule, float* coefficients, int8_t* classes);
void quantize(const Basis& basis, int64_t block, DType to, uint8_t* codes, float* scales, const Pool& pool);
void token_logprobs(const Logits& logits, const LogProbs& out, const Pool& pool);
void token_logprobs_backward(const Logits& logits, const LogProbs& forward, const LogProbsGradient& gradient,
                             const Pool& pool);

// Name of the instruction set in use; throws as select_isa() does.
const char* isa();

}  // namespace carerl::cpu
