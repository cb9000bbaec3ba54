// The ops of torch.ops.carerl on CUDA tensors, on the current stream.
// LibTorch stable ABI only, and no CUDA header: one binary loads in every torch from 2.10 on, with or without CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>

#include "../kernels/cuda/ops.h"
#include "bindings.h"

// The tests compile this file against a host emulator of CUDA, as ops of another namespace on CPU tensors.
#ifndef CARERL_OPS_NAMESPACE
#define CARERL_OPS_NAMESPACE carerl
#define CARERL_OPS_KEY CUDA
#endif

// Weak: only libtorch_cuda.so has it, and this library also loads beside a torch without CUDA.
extern "C" __attribute__((weak)) AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device, void** stream);

namespace carerl {
namespace {

// Device and stream of a call, and the memory that its kernels use: torch's allocator reuses it in the order of the
// stream.
class Context {
 public:
  explicit Context(const Tensor& like) : like_(like) {
    if (!like.is_cuda()) return;  // under emulation
    guard_.emplace(like.get_device_index());
    CARERL_SHIM(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream_));
  }
  Context(const Context&) = delete;

  cuda::Device device() {
    return {stream_,
            {[](void* context, int64_t bytes) { return static_cast<Context*>(context)->allocate(bytes); }, this}};
  }
  Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype) { return carerl::empty(sizes, dtype, &like_); }

 private:
  void* allocate(int64_t bytes) {
    kept_.push_back(empty({bytes}, ScalarType::Char));
    return kept_.back().data_ptr();
  }

  const Tensor& like_;
  std::optional<torch::stable::accelerator::DeviceGuard> guard_;
  void* stream_ = nullptr;
  std::vector<Tensor> kept_;
};

struct Cuda {
  using Context = carerl::Context;
  using Call = cuda::Call;

  static Call call(const Gradients& grads, const Basis& basis, Context& context) {
    Call call{basis, {}, grads.batch, grads.stride, grads.dtype, grads.per_tensor(), context.device()};
    call.spans.reserve(grads.parts.size());
    for (const Gradients::Part& part : grads.parts) call.spans.push_back({part.data, part.column, part.length, 0});
    return call;
  }
  static cuda::InputCall inputs(const List& matrices, const Tensor& directions, bool left, Context& context) {
    cuda::InputCall call{pointers(matrices), {}, context.device()};
    call.all.directions = directions.data_ptr();
    call.all.outputs = matrices[0].size(left ? 1 : 0);
    call.all.inputs = directions.size(2);
    call.all.count = directions.size(1);
    call.all.left = left;
    call.all.dtype = dtype_of(matrices[0]);
    call.all.direction_dtype = dtype_of(directions);
    return call;
  }

  static void project(const char* op, const Call& call, double* out) { cuda::project(op, call, out); }
  static void project(const char* op, const Call& call, float* out) { cuda::project(op, call, out); }
  static constexpr auto gram = cuda::gram;
  static constexpr auto edit = cuda::edit;
  static constexpr auto rotate = cuda::rotate;
  static constexpr auto edit_rotate = cuda::edit_rotate;
  static constexpr auto dacsp = cuda::dacsp;
  static constexpr auto input_project = cuda::input_project;
  static constexpr auto input_edit = cuda::input_edit;
  static void quantize(const char* op, const Basis& basis, int64_t block, DType to, uint8_t* codes, float* scales,
                       Context& context) {
    cuda::quantize(op, basis, block, to, codes, scales, context.device());
  }
  static void token_logprobs(const char* op, const Logits& logits, const LogProbs& out, Context& context) {
    cuda::token_logprobs(op, logits, out, context.device());
  }
  static void token_logprobs_backward(const char* op, const Logits& logits, const LogProbs& forward,
                                      const LogProbsGradient& gradient, Context& context) {
    cuda::token_logprobs_backward(op, logits, forward, gradient, context.device());
  }
};

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CARERL_OPS_NAMESPACE, CARERL_OPS_KEY, m) { add_ops<Cuda>(m); }

}  // namespace carerl
