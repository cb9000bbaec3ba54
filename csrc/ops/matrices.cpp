// The ops over weight matrices and lists of numbers, on CPU tensors.
#include "../kernels/cpu/matrices.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "tensors.h"

namespace carerl {
namespace {

cpu::Blocks blocks_of(const List& matrices, const Tensor& left, const Tensor& right, int64_t domains) {
  cpu::Blocks blocks{{},      data<float>(left),      data<float>(right),    left.size(1), right.size(1),
                     domains, left.size(2) / domains, dtype_of(matrices[0]), pool()};
  blocks.matrices.reserve(matrices.size());
  for (const Tensor& matrix : matrices) blocks.matrices.push_back(matrix.data_ptr());
  return blocks;
}

Tensor block_project(const List& matrices, const Tensor& left, const Tensor& right, int64_t domains) {
  check_matrices("block_project", matrices, left, right);
  check_block_domains(domains, left);
  const cpu::Blocks blocks = blocks_of(matrices, left, right, domains);
  Tensor out = empty({left.size(0), domains, blocks.rank, blocks.rank}, ScalarType::Double);
  cpu::block_project(blocks, data<double>(out));
  return out;
}

void block_edit_(const List& matrices, const Tensor& left, const Tensor& mix, const Tensor& right) {
  check_matrices("block_edit_", matrices, left, right);
  check_block_mix(mix, left);
  cpu::block_edit(blocks_of(matrices, left, right, mix.size(1)), data<float>(mix));
}

cpu::Inputs inputs_of(const List& matrices, const Tensor& directions, bool left) {
  const cpu::Input first{nullptr, directions.data_ptr(), matrices[0].size(0), matrices[0].size(1), directions.size(1),
                         left,    dtype_of(matrices[0]), dtype_of(directions)};
  cpu::Inputs inputs{{}, first, pool()};
  inputs.matrices.reserve(matrices.size());
  for (const Tensor& matrix : matrices) inputs.matrices.push_back(matrix.data_ptr());
  return inputs;
}

Tensor input_project(const List& matrices, const Tensor& directions, bool left) {
  check_input("input_project", matrices, directions, left);
  const cpu::Inputs inputs = inputs_of(matrices, directions, left);
  Tensor out = empty({directions.size(0), inputs.first.outputs(), inputs.first.count}, ScalarType::Float);
  cpu::input_project(inputs, data<float>(out));
  return out;
}

Tensor input_edit(const List& matrices, const Tensor& directions, bool left, const cpu::InputRule& rule) {
  Tensor energies = empty({directions.size(0)}, ScalarType::Double);
  cpu::input_edit(inputs_of(matrices, directions, left), rule, data<double>(energies));
  return energies;
}

Tensor input_confine_(const List& matrices, const Tensor& directions, const Tensor& anchor, const Optional& lower,
                      const Optional& upper, bool left) {
  const char* op = "input_confine_";
  check_input(op, matrices, directions, left);
  check_bound(op, "anchor", anchor, matrices, directions, left);
  if (lower) check_bound(op, "lower", *lower, matrices, directions, left);
  if (upper) check_bound(op, "upper", *upper, matrices, directions, left);
  const cpu::InputRule rule{
      data<float>(anchor), lower ? data<float>(*lower) : nullptr, upper ? data<float>(*upper) : nullptr, {}, {}, {}};
  return input_edit(matrices, directions, left, rule);
}

Tensor input_dacsp_(const List& matrices, const Tensor& directions, double aligned, double conflict, double threshold,
                    bool left) {
  const char* op = "input_dacsp_";
  check_input(op, matrices, directions, left);
  check_weight(op, "aligned", aligned, true);
  check_weight(op, "conflict", conflict, true);
  check_weight(op, "threshold", threshold, false);
  const cpu::InputRule rule{nullptr,
                            nullptr,
                            nullptr,
                            {static_cast<float>(aligned - 1.0), nullptr},
                            {static_cast<float>(conflict - 1.0), nullptr},
                            {static_cast<float>(threshold), nullptr}};
  return input_edit(matrices, directions, left, rule);
}

Tensor input_dacsp_tensor(const List& matrices, const Tensor& directions, const Tensor& aligned, const Tensor& conflict,
                          const Tensor& threshold, bool left) {
  const char* op = "input_dacsp_";
  check_input(op, matrices, directions, left);
  const int64_t count = directions.size(1);
  check_weight(op, "aligned", aligned, count, directions, "directions");
  check_weight(op, "conflict", conflict, count, directions, "directions");
  check_weight(op, "threshold", threshold, count, directions, "directions");
  const cpu::InputRule rule{
      nullptr, nullptr, nullptr, {0, data<float>(aligned)}, {0, data<float>(conflict)}, {0, data<float>(threshold)}};
  return input_edit(matrices, directions, left, rule);
}

Tensor packed_times(const Tensor& packed, const Tensor& x) {
  check_packed(packed, x);
  Tensor out = empty({x.size(0), x.size(1), x.size(2)}, ScalarType::Double);
  cpu::packed_times(data<float>(packed), x.size(1), x.size(2), x.size(0), data<double>(x), data<double>(out), pool());
  return out;
}

cpu::Numbers numbers_of(const Tensor& tensor) {
  const int64_t n = tensor.numel();
  switch (tensor.scalar_type()) {
    case ScalarType::Double:
      return {tensor.data_ptr(), n, 8, 0x7ff0000000000000};
    case ScalarType::Float:
      return {tensor.data_ptr(), n, 4, 0x7f800000};
    case ScalarType::Half:
      return {tensor.data_ptr(), n, 2, 0x7c00};
    default:
      return {tensor.data_ptr(), n, 2, 0x7f80};
  }
}

Tensor all_finite(const List& tensors) {
  check_numbers(tensors);
  std::vector<cpu::Numbers> numbers;
  numbers.reserve(tensors.size());
  for (const Tensor& tensor : tensors) numbers.push_back(numbers_of(tensor));
  Tensor out = empty({}, ScalarType::Bool);
  *data<bool>(out) = cpu::all_finite(numbers, pool());
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(carerl, CPU, m) {
  m.impl("block_project", TORCH_BOX(&block_project));
  m.impl("block_edit_", TORCH_BOX(&block_edit_));
  m.impl("input_project", TORCH_BOX(&input_project));
  m.impl("input_confine_", TORCH_BOX(&input_confine_));
  m.impl("input_dacsp_", TORCH_BOX(&input_dacsp_));
  m.impl("input_dacsp_.tensor", TORCH_BOX(&input_dacsp_tensor));
  m.impl("packed_times", TORCH_BOX(&packed_times));
  m.impl("all_finite", TORCH_BOX(&all_finite));
}

}  // namespace carerl
