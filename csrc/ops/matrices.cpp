// Ops that only the CPU has kernels for: two-sided directions of weight matrices, packed roots, and lists of numbers.
#include "../kernels/cpu/matrices.h"

#include <torch/csrc/stable/library.h>

#include "checks.h"
#include "pool.h"
#include "tensors.h"

namespace carerl {
namespace {

cpu::Blocks blocks_of(const List& matrices, const Tensor& left, const Tensor& right, int64_t domains) {
  return {pointers(matrices),     data<float>(left),     data<float>(right),
          left.size(1),           right.size(1),         domains,
          left.size(2) / domains, dtype_of(matrices[0]), pool()};
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
  m.impl("packed_times", TORCH_BOX(&packed_times));
  m.impl("all_finite", TORCH_BOX(&all_finite));
}

}  // namespace carerl
