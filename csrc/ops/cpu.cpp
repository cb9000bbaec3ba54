// The ops of torch.ops.carerl on CPU tensors: checks, pointers, and the kernels' own drivers. LibTorch stable ABI only,
// so that one binary loads in every torch from 2.10 on.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "checks.h"
#include "tensors.h"

namespace carerl {
namespace {

cpu::Basis basis_of(const Tensor& bases, const Optional& scales, const BasisShape& shape) {
  return {bases.data_ptr(), scales ? data<float>(*scales) : nullptr,
          shape.rows,       shape.stride,
          shape.blocks,     shape.block_shift,
          dtype_of(bases)};
}

cpu::Call batch_call(const Tensor& grads, int64_t batch, const cpu::Basis& basis) {
  const bool matrix = grads.dim() == 2;
  const int64_t stride = matrix ? grads.stride(0) : 0;
  return {basis, {cpu::Span{grads.data_ptr(), stride, batch, dtype_of(grads), 0, basis.stride}}, false, pool()};
}

cpu::Call list_call(const List& grads, const Offsets& offsets, bool per_tensor, const cpu::Basis& basis) {
  cpu::Call call{basis, {}, per_tensor, pool()};
  call.spans.reserve(grads.size());
  const cpu::DType dtype = dtype_of(grads[0]);
  for (size_t t = 0; t < grads.size(); ++t) {
    call.spans.push_back({grads[t].data_ptr(), 0, 1, dtype, offsets[t], grads[t].numel()});
  }
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

Tensor project_into(const cpu::Call& call, const std::vector<int64_t>& sizes, ScalarType dtype) {
  Tensor out = empty(sizes, dtype);
  if (dtype == ScalarType::Double) {
    cpu::project(call, data<double>(out));
  } else {
    std::vector<double> totals(call.groups() * call.batch() * call.basis.rows);
    cpu::project(call, totals.data());
    std::transform(totals.begin(), totals.end(), data<float>(out), [](double x) { return static_cast<float>(x); });
  }
  return out;
}

Tensor project(const Tensor& grads, const Tensor& bases, const Optional& scales, ScalarType out_dtype) {
  const BasisShape shape = check_bases("project", bases, scales, false);
  const int64_t batch = check_grads("project", grads, bases, false);
  check_out_dtype("project", out_dtype);
  return project_into(batch_call(grads, batch, basis_of(bases, scales, shape)), batch_sizes(grads, bases), out_dtype);
}

Tensor project_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Optional& scales,
                    ScalarType out_dtype, bool per_tensor) {
  const BasisShape shape = check_bases("project", bases, scales, false);
  check_list("project", grads, offsets, bases);
  check_out_dtype("project", out_dtype);
  return project_into(list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape)),
                      list_sizes(grads, per_tensor, {bases.size(0), bases.size(1)}), out_dtype);
}

// ------------------------------------------------------------------------------------------------------------- gram

Tensor gram(const Tensor& bases, const Tensor& grads, const Optional& scales) {
  const BasisShape shape = check_bases("gram", bases, scales, true);
  const int64_t batch = check_grads("gram", grads, bases, false), size = shape.rows + batch;
  Tensor out = empty({size, size}, ScalarType::Double);
  cpu::gram(batch_call(grads, batch, basis_of(bases, scales, shape)), data<double>(out));
  return out;
}

Tensor gram_list(const Tensor& bases, const List& grads, const Offsets& offsets, const Optional& scales,
                 bool per_tensor) {
  const BasisShape shape = check_bases("gram", bases, scales, true);
  check_list("gram", grads, offsets, bases);
  Tensor out = empty(list_sizes(grads, per_tensor, {shape.rows + 1, shape.rows + 1}), ScalarType::Double);
  cpu::gram(list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape)), data<double>(out));
  return out;
}

// ------------------------------------------------------------------------------------------------------------- edit

void edit_(const Tensor& grads, const Tensor& bases, const Tensor& mix, const Tensor& scale, const Optional& scales) {
  const BasisShape shape = check_bases("edit_", bases, scales, false);
  const int64_t batch = check_grads("edit_", grads, bases, true);
  check_mix("edit_", mix, scale, batch, shape.rows, bases);
  cpu::edit(batch_call(grads, batch, basis_of(bases, scales, shape)), data<float>(mix), data<float>(scale));
}

void edit_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Tensor& mix, const Tensor& scale,
               const Optional& scales, bool per_tensor) {
  const BasisShape shape = check_bases("edit_", bases, scales, false);
  check_list("edit_", grads, offsets, bases);
  check_mix("edit_", mix, scale, groups_of(grads, per_tensor), shape.rows, bases);
  cpu::edit(list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape)), data<float>(mix),
            data<float>(scale));
}

// ----------------------------------------------------------------------------------------------------------- rotate

cpu::Rotation rotation_of(const Tensor& q, int64_t seed) { return {data<float>(q), q.size(q.dim() - 2), seed}; }

// Rows of one domain out of a stack.
cpu::Basis domain_of(const Tensor& bases, const cpu::Basis& all, int64_t domain) {
  cpu::Basis one = all;
  one.rows = bases.size(1);
  one.data = static_cast<char*>(all.data) + domain * one.rows * all.stride * cpu::element_size(all.dtype);
  return one;
}

void rotate_(const Tensor& bases, const Tensor& grads, const Tensor& q, int64_t seed) {
  const BasisShape shape = check_rotatable("rotate_", bases, false);
  const int64_t batch = check_grads("rotate_", grads, bases, false);
  check_q("rotate_", q, bases, batch, -1);
  cpu::rotate(batch_call(grads, batch, basis_of(bases, {}, shape)), rotation_of(q, seed));
}

void rotate_list(const Tensor& bases, const List& grads, const Offsets& offsets, const Tensor& q, bool per_tensor,
                 int64_t seed) {
  const BasisShape shape = check_rotatable("rotate_", bases, false);
  check_list("rotate_", grads, offsets, bases);
  check_q("rotate_", q, bases, 1, per_tensor ? static_cast<int64_t>(grads.size()) : -1);
  cpu::rotate(list_call(grads, offsets, per_tensor, basis_of(bases, {}, shape)), rotation_of(q, seed));
}

void edit_rotate_(const Tensor& grads, const Tensor& bases, const Tensor& mix, const Tensor& scale, int64_t domain,
                  const Tensor& q, int64_t seed) {
  const BasisShape shape = check_rotatable("edit_rotate_", bases, true);
  const int64_t batch = check_grads("edit_rotate_", grads, bases, true);
  check_mix("edit_rotate_", mix, scale, batch, shape.rows, bases);
  check_domain("edit_rotate_", domain, bases);
  check_q("edit_rotate_", q, bases, batch, -1);
  const cpu::Call call = batch_call(grads, batch, basis_of(bases, {}, shape));
  cpu::edit_rotate(call, domain_of(bases, call.basis, domain), data<float>(mix), data<float>(scale),
                   rotation_of(q, seed));
}

void edit_rotate_list(const List& grads, const Tensor& bases, const Offsets& offsets, const Tensor& mix,
                      const Tensor& scale, int64_t domain, const Tensor& q, bool per_tensor, int64_t seed) {
  const BasisShape shape = check_rotatable("edit_rotate_", bases, true);
  check_list("edit_rotate_", grads, offsets, bases);
  check_mix("edit_rotate_", mix, scale, groups_of(grads, per_tensor), shape.rows, bases);
  check_domain("edit_rotate_", domain, bases);
  check_q("edit_rotate_", q, bases, 1, per_tensor ? static_cast<int64_t>(grads.size()) : -1);
  const cpu::Call call = list_call(grads, offsets, per_tensor, basis_of(bases, {}, shape));
  cpu::edit_rotate(call, domain_of(bases, call.basis, domain), data<float>(mix), data<float>(scale),
                   rotation_of(q, seed));
}

// ------------------------------------------------------------------------------------------------------------ dacsp

using Pair = std::tuple<Tensor, Tensor>;

cpu::Weights checked(const char* name, double value, const Tensor&, int64_t, bool negative_allowed = true) {
  check_weight("dacsp_", name, value, negative_allowed);
  return {value, nullptr};
}

cpu::Weights checked(const char* name, const Tensor& value, const Tensor& bases, int64_t rows, bool = true) {
  check_weight("dacsp_", name, value, rows, bases);
  return {0.0, data<float>(value)};
}

// Scalar is double, or a tensor of one weight per row.
template <class Scalar>
cpu::Rule checked_rule(const Scalar& aligned, const Scalar& conflict, const Scalar& threshold, const Optional& root,
                       const Tensor& bases, int64_t rows, int64_t groups) {
  cpu::Rule rule{checked("aligned", aligned, bases, rows), checked("conflict", conflict, bases, rows),
                 checked("threshold", threshold, bases, rows, false), nullptr, false};
  check_root(root, rows, groups, bases);
  if (root) {
    rule.root = root->data_ptr();
    rule.root_is_double = root->scalar_type() == ScalarType::Double;
  }
  return rule;
}

Pair dacsp_into(const cpu::Call& call, const cpu::Rule& rule, const std::vector<int64_t>& sizes) {
  Pair out(empty(sizes, ScalarType::Float), empty(sizes, ScalarType::Char));
  cpu::dacsp(call, rule, data<float>(std::get<0>(out)), data<int8_t>(std::get<1>(out)));
  return out;
}

template <class Scalar>
Pair dacsp_(const Tensor& grads, const Tensor& bases, Scalar aligned, Scalar conflict, Scalar threshold,
            const Optional& root, const Optional& scales) {
  const BasisShape shape = check_bases("dacsp_", bases, scales, false);
  const int64_t batch = check_grads("dacsp_", grads, bases, true);
  const cpu::Rule rule = checked_rule(aligned, conflict, threshold, root, bases, shape.rows, -1);
  return dacsp_into(batch_call(grads, batch, basis_of(bases, scales, shape)), rule, batch_sizes(grads, bases));
}

template <class Scalar>
Pair dacsp_list(const List& grads, const Tensor& bases, const Offsets& offsets, Scalar aligned, Scalar conflict,
                Scalar threshold, const Optional& root, const Optional& scales, bool per_tensor) {
  const BasisShape shape = check_bases("dacsp_", bases, scales, false);
  check_list("dacsp_", grads, offsets, bases);
  const int64_t groups = per_tensor ? static_cast<int64_t>(grads.size()) : -1;
  const cpu::Rule rule = checked_rule(aligned, conflict, threshold, root, bases, shape.rows, groups);
  return dacsp_into(list_call(grads, offsets, per_tensor, basis_of(bases, scales, shape)), rule,
                    list_sizes(grads, per_tensor, {bases.size(0), bases.size(1)}));
}

// --------------------------------------------------------------------------------------------------------- quantize

Pair quantize_bases(const Tensor& bases, int64_t block, ScalarType dtype) {
  check_quantize(bases, block, dtype);
  const int64_t domains = bases.size(0), slots = bases.size(1), n = bases.size(2);
  Pair out(empty({domains, slots, n}, dtype), empty({domains, slots, (n + block - 1) / block}, ScalarType::Float));
  const cpu::Basis basis{bases.data_ptr(), nullptr, domains * slots, n, 0, 0, dtype_of(bases)};
  cpu::quantize(basis, block, dtype_of(std::get<0>(out)), data<uint8_t>(std::get<0>(out)),
                data<float>(std::get<1>(out)), pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carerl, CPU, m) {
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
}

}  // namespace carerl
