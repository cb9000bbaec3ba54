// token_logprobs on CPU tensors. The backward pass has an op of its own, so that autograd needs nothing native.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "../kernels/cpu/ops.h"
#include "checks.h"
#include "tensors.h"

namespace carerl {
namespace {

constexpr const char* kForward = "token_logprobs";
constexpr const char* kBackward = "token_logprobs_backward";

cpu::Logits checked_logits(const char* op, const Tensor& logits, const Tensor& ids, double temperature) {
  check_logits(op, logits, ids, temperature);
  return {logits.data_ptr(), logits.size(0),     logits.stride(0),
          logits.size(1),    data<int64_t>(ids), static_cast<float>(1.0 / temperature),
          dtype_of(logits)};
}

std::tuple<Tensor, Tensor> token_logprobs(const Tensor& logits, const Tensor& ids, double temperature) {
  const cpu::Logits rows = checked_logits(kForward, logits, ids, temperature);
  std::tuple<Tensor, Tensor> out(empty({rows.rows}, ScalarType::Float), empty({rows.rows}, ScalarType::Float));
  cpu::token_logprobs(rows, {data<float>(std::get<0>(out)), data<float>(std::get<1>(out))}, pool());
  return out;
}

Tensor token_logprobs_backward(const Tensor& grad_logp, const Tensor& grad_entropy, const Tensor& logits,
                               const Tensor& ids, const Tensor& logp, const Tensor& entropy, double temperature) {
  const cpu::Logits rows = checked_logits(kBackward, logits, ids, temperature);
  check_vector(kBackward, "grad_logp", grad_logp, logits);
  check_vector(kBackward, "grad_entropy", grad_entropy, logits);
  check_vector(kBackward, "logp", logp, logits);
  check_vector(kBackward, "entropy", entropy, logits);
  Tensor out = empty({rows.rows, rows.vocabulary}, logits.scalar_type());
  cpu::token_logprobs_backward(rows, {data<float>(logp), data<float>(entropy)},
                               {data<float>(grad_logp), data<float>(grad_entropy), out.data_ptr()}, pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carerl, CPU, m) {
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace carerl
