// The ops of torch.ops.carerl on CUDA tensors: checks, pointers, the current stream, and the kernels' own drivers.
// LibTorch stable ABI only, and no CUDA header: one binary loads in every torch from 2.10 on, with or without CUDA.
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <optional>
#include <tuple>

#include "../kernels/cuda/ops.h"
#include "checks.h"
#include "tensors.h"

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

cuda::DType cuda_dtype(const Tensor& tensor) { return static_cast<cuda::DType>(dtype_of(tensor)); }
static_assert(static_cast<int>(cuda::DType::kF8) == static_cast<int>(cpu::DType::kF8), "the same types in one order");

cuda::Basis basis_of(const Tensor& bases, const Optional& scales, const BasisShape& shape) {
  return {bases.data_ptr(), scales ? data<float>(*scales) : nullptr,
          shape.rows,       shape.stride,
          shape.blocks,     shape.block_shift,
          cuda_dtype(bases)};
}

cuda::Call batch_call(const Tensor& grads, int64_t batch, const cuda::Basis& basis, Context& context) {
  const int64_t stride = grads.dim() == 2 ? grads.stride(0) : 0;
  return {basis, {{grads.data_ptr(), 0, basis.stride, 0}}, batch, stride, cuda_dtype(grads), false, context.device()};
}

cuda::Call list_call(const List& grads, const Offsets& offsets, bool per_tensor, const cuda::Basis& basis,
                     Context& context) {
  cuda::Call call{basis, {}, 1, 0, cuda_dtype(grads[0]), per_tensor, context.device()};
  call.spans.reserve(grads.size());
  for (size_t t = 0; t < grads.size(); ++t)
    call.spans.push_back({grads[t].data_ptr(), offsets[t], grads[t].numel(), 0});
  return call;
}

int64_t groups_of(const List& grads, bool per_tensor) { return per_tensor ? static_cast<int64_t>(grads.size()) : 1; }

// [T] with per-tensor coefficients, [] when summed, followed by `tail`.
std::vector<int64_t> list_sizes(const List& grads, bool per_tensor, std::initializer_list<int64_t> tail) {
  std::vector<int64_t> sizes;
  if (per_tensor) sizes.push_back(static_cast<int64_t>(grads.size()));
  sizes.insert(sizes.end(), tail);
  return sizes;
}

std::vector<int64_t> batch_sizes(const Tensor& grads, const Tensor& bases) {
  if (grads.dim() == 1) return {bases.size(0), bases.size(1)};
  return {grads.size(0), bases.size(0), bases.size(1)};
}

// ---------------------------------------------------------------------------------------------------------- project

Tensor project_into(const cuda::Call& call, const std::vector<int64_t>& sizes, ScalarType dtype, Context& context) {
  Tensor out = context.empty(sizes, dtype);
  if (dtype == ScalarType::Double)
    cuda::project("project", call, data<double>(out));
  else
    cuda::project("project", call, data<float>(out));
  return out;
}

Tensor project(const Tensor& grads, const Tensor& bases, const Optional& scales, ScalarType out_dtype) {
  const BasisShape shape = check_bases("project", bases, scales, false);
  const int64_t batch = check_grads("project", grads, bases, false);
  check_out_dtype("project", out_dtype);
  Context context(bases);
  return project_into(batch_call(grads, batch, basis_of(bases, scales, shape), context), batch_sizes(grads, bases),
                      out_dtype, context);
}

Tensor project_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Optional& scales,
                    ScalarType out_dtype, bool per_tensor) {
  const BasisShape shape = check_bases("project", bases, scales, false);
  check_list("project", grads, offsets, bases);
  check_out_dtype("project", out_dtype);
  Context context(bases);
  return project_into(list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape), context),
                      list_sizes(grads, per_tensor, {bases.size(0), bases.size(1)}), out_dtype, context);
}

// ------------------------------------------------------------------------------------------------------------- gram

Tensor gram(const Tensor& bases, const Tensor& grads, const Optional& scales) {
  const BasisShape shape = check_bases("gram", bases, scales, true);
  const int64_t batch = check_grads("gram", grads, bases, false), size = shape.rows + batch;
  Context context(bases);
  Tensor out = context.empty({size, size}, ScalarType::Double);
  cuda::gram("gram", batch_call(grads, batch, basis_of(bases, scales, shape), context), data<double>(out));
  return out;
}

Tensor gram_list(const Tensor& bases, const List& grads, const Offsets& offsets, const Optional& scales,
                 bool per_tensor) {
  const BasisShape shape = check_bases("gram", bases, scales, true);
  check_list("gram", grads, offsets, bases);
  Context context(bases);
  Tensor out = context.empty(list_sizes(grads, per_tensor, {shape.rows + 1, shape.rows + 1}), ScalarType::Double);
  cuda::gram("gram", list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape), context), data<double>(out));
  return out;
}

// ------------------------------------------------------------------------------------------------------------- edit

void edit_(const Tensor& grads, const Tensor& bases, const Tensor& mix, const Tensor& scale, const Optional& scales) {
  const BasisShape shape = check_bases("edit_", bases, scales, false);
  const int64_t batch = check_grads("edit_", grads, bases, true);
  check_mix("edit_", mix, scale, batch, shape.rows, bases);
  Context context(bases);
  cuda::edit("edit_", batch_call(grads, batch, basis_of(bases, scales, shape), context),
             {data<float>(mix), data<float>(scale)});
}

void edit_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Tensor& mix, const Tensor& scale,
               const Optional& scales, bool per_tensor) {
  const BasisShape shape = check_bases("edit_", bases, scales, false);
  check_list("edit_", grads, offsets, bases);
  check_mix("edit_", mix, scale, groups_of(grads, per_tensor), shape.rows, bases);
  Context context(bases);
  cuda::edit("edit_", list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape), context),
             {data<float>(mix), data<float>(scale)});
}

// ----------------------------------------------------------------------------------------------------------- rotate

// Rows of one domain out of a stack.
cuda::Basis domain_of(const Tensor& bases, const cuda::Basis& all, int64_t domain) {
  cuda::Basis one = all;
  one.rows = bases.size(1);
  one.data = static_cast<char*>(all.data) + domain * one.rows * all.stride * cuda::element_size(all.dtype);
  return one;
}

void rotate_(const Tensor& bases, const Tensor& grads, const Tensor& q, int64_t seed) {
  const BasisShape shape = check_rotatable("rotate_", bases, false);
  const int64_t batch = check_grads("rotate_", grads, bases, false);
  check_q("rotate_", q, bases, batch, -1);
  Context context(bases);
  cuda::rotate("rotate_", batch_call(grads, batch, basis_of(bases, {}, shape), context), data<float>(q), q.size(0),
               seed);
}

void rotate_list(const Tensor& bases, const List& grads, const Offsets& offsets, const Tensor& q, bool per_tensor,
                 int64_t seed) {
  const BasisShape shape = check_rotatable("rotate_", bases, false);
  check_list("rotate_", grads, offsets, bases);
  check_q("rotate_", q, bases, 1, per_tensor ? static_cast<int64_t>(grads.size()) : -1);
  Context context(bases);
  cuda::rotate("rotate_", list_call(grads, offsets, per_tensor, basis_of(bases, {}, shape), context), data<float>(q),
               q.size(q.dim() - 2), seed);
}

void edit_rotate_(const Tensor& grads, const Tensor& bases, const Tensor& mix, const Tensor& scale, int64_t domain,
                  const Tensor& q, int64_t seed) {
  const BasisShape shape = check_rotatable("edit_rotate_", bases, true);
  const int64_t batch = check_grads("edit_rotate_", grads, bases, true);
  check_mix("edit_rotate_", mix, scale, batch, shape.rows, bases);
  check_domain("edit_rotate_", domain, bases);
  check_q("edit_rotate_", q, bases, batch, -1);
  Context context(bases);
  const cuda::Call call = batch_call(grads, batch, basis_of(bases, {}, shape), context);
  cuda::edit_rotate("edit_rotate_", call, domain_of(bases, call.basis, domain), {data<float>(mix), data<float>(scale)},
                    data<float>(q), q.size(0), seed);
}

void edit_rotate_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Tensor& mix,
                      const Tensor& scale, int64_t domain, const Tensor& q, bool per_tensor, int64_t seed) {
  const BasisShape shape = check_rotatable("edit_rotate_", bases, true);
  check_list("edit_rotate_", grads, offsets, bases);
  check_mix("edit_rotate_", mix, scale, groups_of(grads, per_tensor), shape.rows, bases);
  check_domain("edit_rotate_", domain, bases);
  check_q("edit_rotate_", q, bases, 1, per_tensor ? static_cast<int64_t>(grads.size()) : -1);
  Context context(bases);
  const cuda::Call call = list_call(grads, offsets, per_tensor, basis_of(bases, {}, shape), context);
  cuda::edit_rotate("edit_rotate_", call, domain_of(bases, call.basis, domain), {data<float>(mix), data<float>(scale)},
                    data<float>(q), q.size(q.dim() - 2), seed);
}

// ------------------------------------------------------------------------------------------------------------ dacsp

using Pair = std::tuple<Tensor, Tensor>;

cuda::Weights checked(const char* name, double value, const Tensor&, int64_t, bool negative_allowed = true) {
  check_weight("dacsp_", name, value, negative_allowed);
  return {value, nullptr};
}

cuda::Weights checked(const char* name, const Tensor& value, const Tensor& bases, int64_t rows, bool = true) {
  check_weight("dacsp_", name, value, rows, bases);
  return {0.0, data<float>(value)};
}

// Scalar is double, or a tensor of one weight per row.
template <class Scalar>
cuda::Rule checked_rule(const Scalar& aligned, const Scalar& conflict, const Scalar& threshold, const Optional& root,
                        const Tensor& bases, int64_t rows, int64_t groups) {
  cuda::Rule rule{checked("aligned", aligned, bases, rows),
                  checked("conflict", conflict, bases, rows),
                  checked("threshold", threshold, bases, rows, false),
                  nullptr,
                  false,
                  groups >= 0};
  check_root(root, rows, groups, bases);
  if (root) {
    rule.root = root->data_ptr();
    rule.root_is_double = root->scalar_type() == ScalarType::Double;
  }
  return rule;
}

Pair dacsp_into(const cuda::Call& call, const cuda::Rule& rule, const std::vector<int64_t>& sizes, Context& context) {
  Pair out(context.empty(sizes, ScalarType::Float), context.empty(sizes, ScalarType::Char));
  cuda::dacsp("dacsp_", call, rule, data<float>(std::get<0>(out)), data<int8_t>(std::get<1>(out)));
  return out;
}

template <class Scalar>
Pair dacsp_(const Tensor& grads, const Tensor& bases, Scalar aligned, Scalar conflict, Scalar threshold,
            const Optional& root, const Optional& scales) {
  const BasisShape shape = check_bases("dacsp_", bases, scales, false);
  const int64_t batch = check_grads("dacsp_", grads, bases, true);
  const cuda::Rule rule = checked_rule(aligned, conflict, threshold, root, bases, shape.rows, -1);
  Context context(bases);
  return dacsp_into(batch_call(grads, batch, basis_of(bases, scales, shape), context), rule, batch_sizes(grads, bases),
                    context);
}

template <class Scalar>
Pair dacsp_list(const List& grads, const Tensor& bases, const Offsets& offsets, Scalar aligned, Scalar conflict,
                Scalar threshold, const Optional& root, const Optional& scales, bool per_tensor) {
  const BasisShape shape = check_bases("dacsp_", bases, scales, false);
  check_list("dacsp_", grads, offsets, bases);
  const int64_t groups = per_tensor ? static_cast<int64_t>(grads.size()) : -1;
  const cuda::Rule rule = checked_rule(aligned, conflict, threshold, root, bases, shape.rows, groups);
  Context context(bases);
  return dacsp_into(list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape), context), rule,
                    list_sizes(grads, per_tensor, {bases.size(0), bases.size(1)}), context);
}

// --------------------------------------------------------------------------------------------------------- quantize

Pair quantize_bases(const Tensor& bases, int64_t block, ScalarType dtype) {
  check_quantize(bases, block, dtype);
  const int64_t domains = bases.size(0), slots = bases.size(1), n = bases.size(2);
  Context context(bases);
  Pair out(context.empty({domains, slots, n}, dtype),
           context.empty({domains, slots, (n + block - 1) / block}, ScalarType::Float));
  const cuda::Basis basis{bases.data_ptr(), nullptr, domains * slots, n, 0, 0, cuda_dtype(bases)};
  cuda::quantize("quantize_bases", basis, block, cuda_dtype(std::get<0>(out)), data<uint8_t>(std::get<0>(out)),
                 data<float>(std::get<1>(out)), context.device());
  return out;
}

// --------------------------------------------------------------------------------------------------- token_logprobs

cuda::Logits checked_logits(const char* op, const Tensor& logits, const Tensor& ids, double temperature) {
  check_logits(op, logits, ids, temperature);
  return {logits.data_ptr(), logits.size(0),     logits.stride(0),
          logits.size(1),    data<int64_t>(ids), static_cast<float>(1.0 / temperature),
          cuda_dtype(logits)};
}

Pair token_logprobs(const Tensor& logits, const Tensor& ids, double temperature) {
  const cuda::Logits rows = checked_logits("token_logprobs", logits, ids, temperature);
  Context context(logits);
  Pair out(context.empty({rows.rows}, ScalarType::Float), context.empty({rows.rows}, ScalarType::Float));
  cuda::token_logprobs("token_logprobs", rows, {data<float>(std::get<0>(out)), data<float>(std::get<1>(out))},
                       context.device());
  return out;
}

Tensor token_logprobs_backward(const Tensor& grad_logp, const Tensor& grad_entropy, const Tensor& logits,
                               const Tensor& ids, const Tensor& logp, const Tensor& entropy, double temperature) {
  constexpr const char* kOp = "token_logprobs_backward";
  const cuda::Logits rows = checked_logits(kOp, logits, ids, temperature);
  check_vector(kOp, "grad_logp", grad_logp, logits);
  check_vector(kOp, "grad_entropy", grad_entropy, logits);
  check_vector(kOp, "logp", logp, logits);
  check_vector(kOp, "entropy", entropy, logits);
  Context context(logits);
  Tensor out = context.empty({rows.rows, rows.vocabulary}, logits.scalar_type());
  cuda::token_logprobs_backward(kOp, rows, {data<float>(logp), data<float>(entropy)},
                                {data<float>(grad_logp), data<float>(grad_entropy), out.data_ptr()}, context.device());
  return out;
}

// ----------------------------------------------------------------------------------------------- inputs of matrices

cuda::InputCall input_call(const List& matrices, const Tensor& directions, bool left, Context& context) {
  cuda::InputCall call{{}, {}, context.device()};
  call.list.reserve(matrices.size());
  for (const Tensor& matrix : matrices) call.list.push_back(matrix.data_ptr());
  call.all.directions = directions.data_ptr();
  call.all.outputs = matrices[0].size(left ? 1 : 0);
  call.all.inputs = directions.size(2);
  call.all.count = directions.size(1);
  call.all.left = left;
  call.all.dtype = cuda_dtype(matrices[0]);
  call.all.direction_dtype = cuda_dtype(directions);
  return call;
}

Tensor input_project(const List& matrices, const Tensor& directions, bool left) {
  const char* op = "input_project";
  check_input(op, matrices, directions, left);
  Context context(directions);
  const cuda::InputCall call = input_call(matrices, directions, left, context);
  Tensor out = context.empty({directions.size(0), call.all.outputs, call.all.count}, ScalarType::Float);
  cuda::input_project(op, call, data<float>(out));
  return out;
}

Tensor input_edit(const char* op, const List& matrices, const Tensor& directions, bool left,
                  const cuda::InputRule& rule) {
  Context context(directions);
  Tensor energies = context.empty({directions.size(0)}, ScalarType::Double);
  cuda::input_edit(op, input_call(matrices, directions, left, context), rule, data<double>(energies));
  return energies;
}

Tensor input_confine_(const List& matrices, const Tensor& directions, const Tensor& anchor, const Optional& lower,
                      const Optional& upper, bool left) {
  const char* op = "input_confine_";
  check_input(op, matrices, directions, left);
  check_bound(op, "anchor", anchor, matrices, directions, left);
  if (lower) check_bound(op, "lower", *lower, matrices, directions, left);
  if (upper) check_bound(op, "upper", *upper, matrices, directions, left);
  return input_edit(
      op, matrices, directions, left,
      {data<float>(anchor), lower ? data<float>(*lower) : nullptr, upper ? data<float>(*upper) : nullptr, {}, {}, {}});
}

// A number is double and its difference to 1 rounded once, as in the reference.
float gain_of(const char* op, const char* name, double weight) {
  check_weight(op, name, weight, true);
  return static_cast<float>(weight - 1.0);
}

Tensor input_dacsp_(const List& matrices, const Tensor& directions, double aligned, double conflict, double threshold,
                    bool left) {
  const char* op = "input_dacsp_";
  check_input(op, matrices, directions, left);
  const float up = gain_of(op, "aligned", aligned), down = gain_of(op, "conflict", conflict);
  check_weight(op, "threshold", threshold, false);
  return input_edit(
      op, matrices, directions, left,
      {nullptr, nullptr, nullptr, {up, nullptr}, {down, nullptr}, {static_cast<float>(threshold), nullptr}});
}

Tensor input_dacsp_tensor(const List& matrices, const Tensor& directions, const Tensor& aligned, const Tensor& conflict,
                          const Tensor& threshold, bool left) {
  const char* op = "input_dacsp_";
  check_input(op, matrices, directions, left);
  const int64_t count = directions.size(1);
  check_weight(op, "aligned", aligned, count, directions, "directions");
  check_weight(op, "conflict", conflict, count, directions, "directions");
  check_weight(op, "threshold", threshold, count, directions, "directions");
  return input_edit(
      op, matrices, directions, left,
      {nullptr, nullptr, nullptr, {0, data<float>(aligned)}, {0, data<float>(conflict)}, {0, data<float>(threshold)}});
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(CARERL_OPS_NAMESPACE, CARERL_OPS_KEY, m) {
  m.impl("project", TORCH_BOX(&project));
  m.impl("project.list", TORCH_BOX(&project_list));
  m.impl("gram", TORCH_BOX(&gram));
  m.impl("gram.list", TORCH_BOX(&gram_list));
  m.impl("edit_", TORCH_BOX(&edit_));
  m.impl("edit_.list", TORCH_BOX(&edit_list));
  m.impl("rotate_", TORCH_BOX(&rotate_));
  m.impl("rotate_.list", TORCH_BOX(&rotate_list));
  m.impl("edit_rotate_", TORCH_BOX(&edit_rotate_));
  m.impl("edit_rotate_.list", TORCH_BOX(&edit_rotate_list));
  m.impl("dacsp_", TORCH_BOX(&dacsp_<double>));
  m.impl("dacsp_.tensor", TORCH_BOX(&dacsp_<const Tensor&>));
  m.impl("dacsp_.list", TORCH_BOX(&dacsp_list<double>));
  m.impl("dacsp_.list_tensor", TORCH_BOX(&dacsp_list<const Tensor&>));
  m.impl("quantize_bases", TORCH_BOX(&quantize_bases));
  m.impl("input_project", TORCH_BOX(&input_project));
  m.impl("input_confine_", TORCH_BOX(&input_confine_));
  m.impl("input_dacsp_", TORCH_BOX(&input_dacsp_));
  m.impl("input_dacsp_.tensor", TORCH_BOX(&input_dacsp_tensor));
  m.impl("token_logprobs", TORCH_BOX(&token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&token_logprobs_backward));
}

}  // namespace carerl
