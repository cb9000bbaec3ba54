// Launches of what is neither pass: quantize and token_logprobs.
#include "launch.h"
#include "quantize_bases.cuh"
#include "token_logprobs.cuh"

namespace carerl::cuda {

void quantize(const char* op, const Basis& basis, int64_t block, DType to, uint8_t* codes, float* scales,
              const Device& device) {
  const int64_t team = block >= 512 ? 32 : block / 16;
  const int64_t threads = basis.rows * ceil_div(basis.stride, block) * team;
  if (threads == 0) return;
  CARERL_LAUNCH(quantize_kernel, dim3(static_cast<unsigned>(ceil_div(threads, 256))), dim3(256), 0, stream_of(device),
                basis, block, to, codes, scales);
  check_launch(op);
}

constexpr int64_t kSumsBytes = kLogitsThreads / 32 * sizeof(RowSums);

void token_logprobs(const char* op, const Logits& logits, const LogProbs& out, const Device& device) {
  if (logits.rows == 0) return;
  CARERL_LAUNCH(logprobs_kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kLogitsThreads), kSumsBytes,
                stream_of(device), logits, out);
  check_launch(op);
}

void token_logprobs_backward(const char* op, const Logits& logits, const LogProbs& forward,
                             const LogProbsGradient& gradient, const Device& device) {
  if (logits.rows == 0) return;
  CARERL_LAUNCH(logprobs_backward_kernel, dim3(static_cast<unsigned>(logits.rows)), dim3(kLogitsThreads), kSumsBytes,
                stream_of(device), logits, forward, gradient);
  check_launch(op);
}

}  // namespace carerl::cuda
