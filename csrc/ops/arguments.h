// Arguments of an op as the kernels take them, checked where they are made.
#pragma once

#include "../kernels/types.h"
#include "checks.h"
#include "tensors.h"

namespace carerl {

// Checked gradients: a batch of them, or the tensors of a list.
struct Gradients {
  struct Part {
    void* data;
    int64_t column, length;
  };
  std::vector<Part> parts;
  int64_t batch = 1, stride = 0;  // gradients of each part, and the elements between two of them
  int64_t groups = -1;            // of per-tensor arguments and results, or they are shared
  bool matrix = false;
  DType dtype;

  Gradients(const char* op, const Tensor& grads, const Tensor& bases, bool written = false)
      : batch(check_grads(op, grads, bases, written)), matrix(grads.dim() == 2), dtype(dtype_of(grads)) {
    if (matrix) stride = grads.stride(0);
    parts = {{grads.data_ptr(), 0, bases.size(bases.dim() - 1)}};
  }
  Gradients(const char* op, const List& grads, const Offsets& offsets, bool per_tensor, const Tensor& bases) {
    check_list(op, grads, offsets, bases);
    dtype = dtype_of(grads[0]);
    if (per_tensor) groups = static_cast<int64_t>(grads.size());
    parts.reserve(grads.size());
    for (size_t t = 0; t < grads.size(); ++t) parts.push_back({grads[t].data_ptr(), offsets[t], grads[t].numel()});
  }

  bool per_tensor() const { return groups >= 0; }
  // Rows of mix and scale.
  int64_t edits() const { return per_tensor() ? groups : batch; }
  // [B] of a batch that is a matrix, [T] with per-tensor coefficients, [] otherwise, followed by [D, k].
  std::vector<int64_t> coefficients(const Tensor& bases) const {
    std::vector<int64_t> sizes;
    if (matrix || per_tensor()) sizes.push_back(edits());
    sizes.insert(sizes.end(), {bases.size(0), bases.size(1)});
    return sizes;
  }
};

inline Basis basis_of(const Tensor& bases, const Optional& scales, const BasisShape& shape) {
  return {bases.data_ptr(), scales ? data<float>(*scales) : nullptr,
          shape.rows,       shape.stride,
          shape.blocks,     shape.block_shift,
          dtype_of(bases)};
}

// Rows of one domain out of a stack.
inline Basis domain_of(const Tensor& bases, const Basis& all, int64_t domain) {
  Basis one = all;
  one.rows = bases.size(1);
  one.data = static_cast<char*>(all.data) + domain * one.rows * all.stride * element_size(all.dtype);
  return one;
}

inline Edit edit_of(const Tensor& mix, const Tensor& scale) { return {data<float>(mix), data<float>(scale)}; }

inline Weights checked(const char* name, double value, const Tensor&, int64_t, bool negative_allowed = true) {
  check_weight("dacsp_", name, value, negative_allowed);
  return {value, nullptr};
}
inline Weights checked(const char* name, const Tensor& value, const Tensor& bases, int64_t rows, bool = true) {
  check_weight("dacsp_", name, value, rows, bases);
  return {0.0, data<float>(value)};
}

// A number is double and its difference to 1 rounded once, as in the reference.
inline float gain_of(const char* op, const char* name, double weight) {
  check_weight(op, name, weight, true);
  return static_cast<float>(weight - 1.0);
}

inline Logits checked_logits(const char* op, const Tensor& logits, const Tensor& ids, double temperature) {
  check_logits(op, logits, ids, temperature);
  return {logits.data_ptr(), logits.size(0),     logits.stride(0),
          logits.size(1),    data<int64_t>(ids), static_cast<float>(1.0 / temperature),
          dtype_of(logits)};
}

}  // namespace carerl
