// The ops of torch.ops.carerl that the native backends share: checks and pointers, written once. A backend has
//   Context(like)            device and memory of a call; empty(sizes, dtype)
//   Call, call(grads, basis, context)
//   InputCall, inputs(matrices, directions, left, context)
// and the ops over these.
#pragma once

#include <tuple>

#include "arguments.h"

namespace carerl {

using Pair = std::tuple<Tensor, Tensor>;

template <class Backend>
struct Ops {
  using Context = typename Backend::Context;
  using Call = typename Backend::Call;

  // -------------------------------------------------------------------------------------------------------- project

  static Tensor project_all(const Gradients& grads, const Tensor& bases, const Basis& basis, ScalarType dtype) {
    const char* op = "project";
    check_out_dtype(op, dtype);
    Context context(bases);
    const Call call = Backend::call(grads, basis, context);
    Tensor out = context.empty(grads.coefficients(bases), dtype);
    if (dtype == ScalarType::Double) {
      Backend::project(op, call, data<double>(out));
    } else {
      Backend::project(op, call, data<float>(out));
    }
    return out;
  }
  static Tensor project(const Tensor& grads, const Tensor& bases, const Optional& scales, ScalarType dtype) {
    const BasisShape shape = check_bases("project", bases, scales, false);
    return project_all({"project", grads, bases}, bases, basis_of(bases, scales, shape), dtype);
  }
  static Tensor project_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Optional& scales,
                             ScalarType dtype, bool per_tensor) {
    const BasisShape shape = check_bases("project", bases, scales, false);
    return project_all({"project", grads, offsets, per_tensor, bases}, bases, basis_of(bases, scales, shape), dtype);
  }

  // ----------------------------------------------------------------------------------------------------------- gram

  static Tensor gram_all(const Gradients& grads, const Tensor& bases, const Basis& basis) {
    const int64_t size = basis.rows + grads.batch;
    std::vector<int64_t> sizes = {size, size};
    if (grads.per_tensor()) sizes.insert(sizes.begin(), grads.groups);
    Context context(bases);
    Tensor out = context.empty(sizes, ScalarType::Double);
    Backend::gram("gram", Backend::call(grads, basis, context), data<double>(out));
    return out;
  }
  static Tensor gram(const Tensor& bases, const Tensor& grads, const Optional& scales) {
    const BasisShape shape = check_bases("gram", bases, scales, true);
    return gram_all({"gram", grads, bases}, bases, basis_of(bases, scales, shape));
  }
  static Tensor gram_list(const Tensor& bases, const List& grads, const Offsets& offsets, const Optional& scales,
                          bool per_tensor) {
    const BasisShape shape = check_bases("gram", bases, scales, true);
    return gram_all({"gram", grads, offsets, per_tensor, bases}, bases, basis_of(bases, scales, shape));
  }

  // ----------------------------------------------------------------------------------------------------------- edit

  static void edit_all(const Gradients& grads, const Tensor& bases, const Basis& basis, const Tensor& mix,
                       const Tensor& scale) {
    check_mix("edit_", mix, scale, grads.edits(), basis.rows, bases);
    Context context(bases);
    Backend::edit("edit_", Backend::call(grads, basis, context), edit_of(mix, scale));
  }
  static void edit(const Tensor& grads, const Tensor& bases, const Tensor& mix, const Tensor& scale,
                   const Optional& scales) {
    const BasisShape shape = check_bases("edit_", bases, scales, false);
    edit_all({"edit_", grads, bases, true}, bases, basis_of(bases, scales, shape), mix, scale);
  }
  static void edit_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Tensor& mix,
                        const Tensor& scale, const Optional& scales, bool per_tensor) {
    const BasisShape shape = check_bases("edit_", bases, scales, false);
    edit_all({"edit_", grads, offsets, per_tensor, bases}, bases, basis_of(bases, scales, shape), mix, scale);
  }

  // --------------------------------------------------------------------------------------------------------- rotate

  static void rotate_all(const Gradients& grads, const Tensor& bases, const Basis& basis, const Tensor& q,
                         int64_t seed) {
    check_q("rotate_", q, bases, grads.batch, grads.groups);
    Context context(bases);
    Backend::rotate("rotate_", Backend::call(grads, basis, context), data<float>(q), q.size(q.dim() - 2), seed);
  }
  static void rotate(const Tensor& bases, const Tensor& grads, const Tensor& q, int64_t seed) {
    const BasisShape shape = check_rotatable("rotate_", bases, false);
    rotate_all({"rotate_", grads, bases}, bases, basis_of(bases, {}, shape), q, seed);
  }
  static void rotate_list(const Tensor& bases, const List& grads, const Offsets& offsets, const Tensor& q,
                          bool per_tensor, int64_t seed) {
    const BasisShape shape = check_rotatable("rotate_", bases, false);
    rotate_all({"rotate_", grads, offsets, per_tensor, bases}, bases, basis_of(bases, {}, shape), q, seed);
  }

  static void edit_rotate_all(const Gradients& grads, const Tensor& bases, const Basis& basis, const Tensor& mix,
                              const Tensor& scale, int64_t domain, const Tensor& q, int64_t seed) {
    const char* op = "edit_rotate_";
    check_mix(op, mix, scale, grads.edits(), basis.rows, bases);
    check_domain(op, domain, bases);
    check_q(op, q, bases, grads.batch, grads.groups);
    Context context(bases);
    Backend::edit_rotate(op, Backend::call(grads, basis, context), domain_of(bases, basis, domain), edit_of(mix, scale),
                         data<float>(q), q.size(q.dim() - 2), seed);
  }
  static void edit_rotate(const Tensor& grads, const Tensor& bases, const Tensor& mix, const Tensor& scale,
                          int64_t domain, const Tensor& q, int64_t seed) {
    const BasisShape shape = check_rotatable("edit_rotate_", bases, true);
    edit_rotate_all({"edit_rotate_", grads, bases, true}, bases, basis_of(bases, {}, shape), mix, scale, domain, q,
                    seed);
  }
  static void edit_rotate_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Tensor& mix,
                               const Tensor& scale, int64_t domain, const Tensor& q, bool per_tensor, int64_t seed) {
    const BasisShape shape = check_rotatable("edit_rotate_", bases, true);
    edit_rotate_all({"edit_rotate_", grads, offsets, per_tensor, bases}, bases, basis_of(bases, {}, shape), mix, scale,
                    domain, q, seed);
  }

  // ---------------------------------------------------------------------------------------------------------- dacsp

  // Scalar is double, or a tensor of one weight per row.
  template <class Scalar>
  static Pair dacsp_all(const Gradients& grads, const Tensor& bases, const Basis& basis, const Scalar& aligned,
                        const Scalar& conflict, const Scalar& threshold, const Optional& root) {
    Rule rule{checked("aligned", aligned, bases, basis.rows),
              checked("conflict", conflict, bases, basis.rows),
              checked("threshold", threshold, bases, basis.rows, false),
              nullptr,
              false,
              grads.per_tensor()};
    check_root(root, basis.rows, grads.groups, bases);
    if (root) {
      rule.root = root->data_ptr();
      rule.root_is_double = root->scalar_type() == ScalarType::Double;
    }
    Context context(bases);
    const std::vector<int64_t> sizes = grads.coefficients(bases);
    Pair out(context.empty(sizes, ScalarType::Float), context.empty(sizes, ScalarType::Char));
    Backend::dacsp("dacsp_", Backend::call(grads, basis, context), rule, data<float>(std::get<0>(out)),
                   data<int8_t>(std::get<1>(out)));
    return out;
  }
  template <class Scalar>
  static Pair dacsp(const Tensor& grads, const Tensor& bases, Scalar aligned, Scalar conflict, Scalar threshold,
                    const Optional& root, const Optional& scales) {
    const BasisShape shape = check_bases("dacsp_", bases, scales, false);
    return dacsp_all({"dacsp_", grads, bases, true}, bases, basis_of(bases, scales, shape), aligned, conflict,
                     threshold, root);
  }
  template <class Scalar>
  static Pair dacsp_list(const List& grads, const Tensor& bases, const Offsets& offsets, Scalar aligned,
                         Scalar conflict, Scalar threshold, const Optional& root, const Optional& scales,
                         bool per_tensor) {
    const BasisShape shape = check_bases("dacsp_", bases, scales, false);
    return dacsp_all({"dacsp_", grads, offsets, per_tensor, bases}, bases, basis_of(bases, scales, shape), aligned,
                     conflict, threshold, root);
  }

  // ------------------------------------------------------------------------------------------------------- quantize

  static Pair quantize_bases(const Tensor& bases, int64_t block, ScalarType dtype) {
    check_quantize(bases, block, dtype);
    const int64_t domains = bases.size(0), slots = bases.size(1), n = bases.size(2);
    Context context(bases);
    Pair out(context.empty({domains, slots, n}, dtype),
             context.empty({domains, slots, (n + block - 1) / block}, ScalarType::Float));
    const Basis basis{bases.data_ptr(), nullptr, domains * slots, n, 0, 0, dtype_of(bases)};
    Backend::quantize("quantize_bases", basis, block, dtype_of(std::get<0>(out)), data<uint8_t>(std::get<0>(out)),
                      data<float>(std::get<1>(out)), context);
    return out;
  }

  // --------------------------------------------------------------------------------------------- inputs of matrices

  static Tensor input_project(const List& matrices, const Tensor& directions, bool left) {
    const char* op = "input_project";
    check_input(op, matrices, directions, left);
    Context context(directions);
    Tensor out =
        context.empty({directions.size(0), matrices[0].size(left ? 1 : 0), directions.size(1)}, ScalarType::Float);
    Backend::input_project(op, Backend::inputs(matrices, directions, left, context), data<float>(out));
    return out;
  }
  static Tensor input_edit(const char* op, const List& matrices, const Tensor& directions, bool left,
                           const InputRule& rule) {
    Context context(directions);
    Tensor energies = context.empty({directions.size(0)}, ScalarType::Double);
    Backend::input_edit(op, Backend::inputs(matrices, directions, left, context), rule, data<double>(energies));
    return energies;
  }
  static Tensor input_confine(const List& matrices, const Tensor& directions, const Tensor& anchor,
                              const Optional& lower, const Optional& upper, bool left) {
    const char* op = "input_confine_";
    check_input(op, matrices, directions, left);
    check_bound(op, "anchor", anchor, matrices, directions, left);
    if (lower) check_bound(op, "lower", *lower, matrices, directions, left);
    if (upper) check_bound(op, "upper", *upper, matrices, directions, left);
    const float* below = lower ? data<float>(*lower) : nullptr;
    const float* above = upper ? data<float>(*upper) : nullptr;
    return input_edit(op, matrices, directions, left, {data<float>(anchor), below, above, {}, {}, {}});
  }
  static Tensor input_dacsp(const List& matrices, const Tensor& directions, double aligned, double conflict,
                            double threshold, bool left) {
    const char* op = "input_dacsp_";
    check_input(op, matrices, directions, left);
    const float up = gain_of(op, "aligned", aligned), down = gain_of(op, "conflict", conflict);
    check_weight(op, "threshold", threshold, false);
    const float tau = static_cast<float>(threshold);
    return input_edit(op, matrices, directions, left,
                      {nullptr, nullptr, nullptr, {up, nullptr}, {down, nullptr}, {tau, nullptr}});
  }
  static Tensor input_dacsp_tensor(const List& matrices, const Tensor& directions, const Tensor& aligned,
                                   const Tensor& conflict, const Tensor& threshold, bool left) {
    const char* op = "input_dacsp_";
    check_input(op, matrices, directions, left);
    const auto weight = [&](const char* name, const Tensor& value) -> InputWeight {
      check_weight(op, name, value, directions.size(1), directions, "directions");
      return {0.0f, data<float>(value)};
    };
    const InputWeight up = weight("aligned", aligned), down = weight("conflict", conflict);
    return input_edit(op, matrices, directions, left,
                      {nullptr, nullptr, nullptr, up, down, weight("threshold", threshold)});
  }

  // ------------------------------------------------------------------------------------------------- token_logprobs

  static Pair token_logprobs(const Tensor& logits, const Tensor& ids, double temperature) {
    const char* op = "token_logprobs";
    const Logits rows = checked_logits(op, logits, ids, temperature);
    Context context(logits);
    Pair out(context.empty({rows.rows}, ScalarType::Float), context.empty({rows.rows}, ScalarType::Float));
    Backend::token_logprobs(op, rows, {data<float>(std::get<0>(out)), data<float>(std::get<1>(out))}, context);
    return out;
  }
  // An op of its own, so that autograd needs nothing native.
  static Tensor token_logprobs_backward(const Tensor& grad_logp, const Tensor& grad_entropy, const Tensor& logits,
                                        const Tensor& ids, const Tensor& logp, const Tensor& entropy,
                                        double temperature) {
    const char* op = "token_logprobs_backward";
    const Logits rows = checked_logits(op, logits, ids, temperature);
    check_vector(op, "grad_logp", grad_logp, logits);
    check_vector(op, "grad_entropy", grad_entropy, logits);
    check_vector(op, "logp", logp, logits);
    check_vector(op, "entropy", entropy, logits);
    Context context(logits);
    Tensor out = context.empty({rows.rows, rows.vocabulary}, logits.scalar_type());
    Backend::token_logprobs_backward(op, rows, {data<float>(logp), data<float>(entropy)},
                                     {data<float>(grad_logp), data<float>(grad_entropy), out.data_ptr()}, context);
    return out;
  }
};

template <class Backend, class Library>
void add_ops(Library& m) {
  using O = Ops<Backend>;
  m.impl("project", TORCH_BOX(&O::project));
  m.impl("project.list", TORCH_BOX(&O::project_list));
  m.impl("gram", TORCH_BOX(&O::gram));
  m.impl("gram.list", TORCH_BOX(&O::gram_list));
  m.impl("edit_", TORCH_BOX(&O::edit));
  m.impl("edit_.list", TORCH_BOX(&O::edit_list));
  m.impl("rotate_", TORCH_BOX(&O::rotate));
  m.impl("rotate_.list", TORCH_BOX(&O::rotate_list));
  m.impl("edit_rotate_", TORCH_BOX(&O::edit_rotate));
  m.impl("edit_rotate_.list", TORCH_BOX(&O::edit_rotate_list));
  m.impl("dacsp_", TORCH_BOX(&O::template dacsp<double>));
  m.impl("dacsp_.tensor", TORCH_BOX(&O::template dacsp<const Tensor&>));
  m.impl("dacsp_.list", TORCH_BOX(&O::template dacsp_list<double>));
  m.impl("dacsp_.list_tensor", TORCH_BOX(&O::template dacsp_list<const Tensor&>));
  m.impl("quantize_bases", TORCH_BOX(&O::quantize_bases));
  m.impl("input_project", TORCH_BOX(&O::input_project));
  m.impl("input_confine_", TORCH_BOX(&O::input_confine));
  m.impl("input_dacsp_", TORCH_BOX(&O::input_dacsp));
  m.impl("input_dacsp_.tensor", TORCH_BOX(&O::input_dacsp_tensor));
  m.impl("token_logprobs", TORCH_BOX(&O::token_logprobs));
  m.impl("token_logprobs_backward", TORCH_BOX(&O::token_logprobs_backward));
}

}  // namespace carerl
