// The ops over weight matrices and whatever else has no rows of bases beside it; see ops.h.
#pragma once

#include <vector>

#include "ops.h"

namespace carerl::cpu {

// Weight matrices [rows, columns] of one shape and their two-sided directions: left [matrices, rows, domains * rank],
// right [matrices, columns, domains * rank].
struct Blocks {
  std::vector<void*> matrices;
  const float *left, *right;
  int64_t rows, columns, domains, rank;
  DType dtype;
  Pool pool;
};

// out [matrices, domains, rank, rank]: U_d^T W V_d
void block_project(const Blocks& blocks, double* out);
// W <- W + sum_d U_d X_d V_d^T, mix X [matrices, domains, rank, rank]; matrices with a non-finite X are left alone.
void block_edit(const Blocks& blocks, const float* mix);

// Weight matrices of one shape and directions of their inputs, [matrices, count, inputs]; see Input.
struct Inputs {
  std::vector<void*> matrices;
  Input first;  // of the first matrix, whatever its pointer
  Pool pool;
};

// out [matrices, outputs, count]
void input_project(const Inputs& inputs, float* out);
// Anchors and bounds [matrices, outputs, count]; energies [matrices]: the sum of x^2.
void input_edit(const Inputs& inputs, const InputRule& rule, double* energies);

// out [vectors, matrices, size] = R x, packed [matrices, size (size + 1) / 2], x like out
void packed_times(const float* packed, int64_t matrices, int64_t size, int64_t vectors, const double* x, double* out,
                  const Pool& pool);

// n numbers of `bytes` each, and the bits that are all set where one is not finite.
struct Numbers {
  const void* data;
  int64_t n, bytes;
  uint64_t exponent;
};
bool all_finite(const std::vector<Numbers>& numbers, const Pool& pool);

}  // namespace carerl::cpu
