// The ops over a whole call: cuts it into slots, launches the kernels on a stream. Knows nothing of torch: tensors come
// as pointers, memory from a function. Nothing here waits for the device, so every op can be captured into a CUDA
// graph.
#pragma once

#include <vector>

#include "types.h"

namespace carerl::cuda {

// Memory on the device that the kernels of a call may use: handed out during the call, reused in the order of the
// stream.
struct Memory {
  void* (*allocate)(void* context, int64_t bytes);
  void* context;
};

struct Device {
  void* stream;
  Memory memory;
};

// What one call works on: a batch of gradients over one span, or the tensors of a list (batch 1 each).
struct Call {
  Basis basis;
  std::vector<Span> spans;  // first_slot is not filled in
  int64_t batch;
  int64_t stride;  // elements between gradients of the batch
  DType dtype;     // of the gradients
  bool per_tensor;
  Device device;

  int64_t groups() const { return per_tensor ? static_cast<int64_t>(spans.size()) : 1; }
};

// One call on the inputs of weight matrices. What `all` says of a launch is not filled in.
struct InputCall {
  std::vector<void*> list;
  Matrices all;
  Device device;
};

// `op` names the op in the text of an error (std::runtime_error). Results have groups() * batch leading entries.
void project(const char* op, const Call& call, double* coefficients);
void project(const char* op, const Call& call, float* coefficients);
void gram(const char* op, const Call& call, double* out);
void edit(const char* op, const Call& call, const Edit& change);
// q [groups, rows, K + batch]
void rotate(const char* op, const Call& call, const float* q, int64_t rows, int64_t seed);
void edit_rotate(const char* op, const Call& call, const Basis& domain, const Edit& change, const float* q,
                 int64_t rows, int64_t seed);
void dacsp(const char* op, const Call& call, const Rule& rule, float* coefficients, int8_t* classes);
void quantize(const char* op, const Basis& basis, int64_t block, DType to, uint8_t* codes, float* scales,
              const Device& device);
// out [matrices, outputs, count]
void input_project(const char* op, const InputCall& call, float* out);
// energies [matrices]: the sum of x^2
void input_edit(const char* op, const InputCall& call, const InputRule& rule, double* energies);
void token_logprobs(const char* op, const Logits& logits, const LogProbs& out, const Device& device);
void token_logprobs_backward(const char* op, const Logits& logits, const LogProbs& forward,
                             const LogProbsGradient& gradient, const Device& device);

}  // namespace carerl::cuda
