// What the CPU kernels and their callers agree on. No torch header, no std template: this header is compiled into one
// translation unit per instruction set, and an inline std function compiled there with AVX-512 could be the copy that
// the linker keeps for everybody.
#pragma once

#include <stddef.h>

#include "../types.h"

namespace carerl::cpu {

// `batch` gradients of `length` elements, and the column of the bases that belongs to their first element. Columns are
// multiples of 128, so that a vector never straddles two blocks of a scale or two halves of the 64-bit position.
struct Span {
  void* grads;
  int64_t stride;  // elements between gradients of the batch
  int64_t batch;
  DType dtype;
  int64_t column;
  int64_t length;
};

// U <- q [U; G], rows from `rows` on become zero. A q that is not finite leaves U alone. Rounding to the storage type
// is stochastic when seed != 0.
struct Rotation {
  const float* q;  // [rows, K + batch]
  int64_t rows;
  int64_t seed;
};

// A weight matrix W [rows, columns] and its two-sided directions: left [rows, q], right [columns, q], q = domains *
// rank, domain after domain.
struct Block {
  void* matrix;
  const float *left, *right;
  int64_t rows, columns, domains, rank;
  DType dtype;
};

// A weight matrix W [rows, columns] and directions V [count, columns] of its inputs: every row w of W is an output with
// coefficients w V^T. With `left`, directions are [count, rows] and the outputs are the columns.
struct Input {
  void* matrix;
  const void* directions;
  int64_t rows, columns, count;
  bool left;
  DType dtype, direction_dtype;

  int64_t outputs() const { return left ? columns : rows; }
  int64_t inputs() const { return left ? rows : columns; }
};

struct KernelTable {
  const char* name;
  // totals [batch, K] += G U^T
  void (*project)(const Basis&, const Span&, double* totals);
  // totals [K + batch, K + batch] += [U; G] [U; G]^T, upper triangle
  void (*gram)(const Basis&, const Span&, double* totals);
  void (*edit)(const Basis&, const Span&, const Edit&);
  void (*rotate)(const Basis&, const Span&, const Rotation&);
  // Both in one pass over memory; `domain` is the part of `all` that is rotated, from the gradients before the edit.
  void (*edit_rotate)(const Basis& all, const Basis& domain, const Span&, const Edit&, const Rotation&);
  // Block-scaled codes (int8 or fp8) of one stretch of a row, which starts on a block boundary.
  void (*quantize)(const void* row, DType, int64_t length, int64_t block, DType to, uint8_t* codes, float* scales);
  // totals [domains, rank, rank] += U_d^T W V_d over rows [begin, end) of W
  void (*block_project)(const Block&, int64_t begin, int64_t end, double* totals);
  // W <- W + sum_d U_d X_d V_d^T on rows [begin, end), mix X [domains, rank, rank]
  void (*block_edit)(const Block&, int64_t begin, int64_t end, const float* mix);
  // The outputs that are worked on together: a function of the shape, so that sums do not depend on the threads.
  int64_t (*input_block)(const Input&);
  // out [outputs, count] on outputs [begin, end) of W, `block` at a time
  void (*input_project)(const Input&, int64_t begin, int64_t end, int64_t block, float* out);
  // Edits outputs [begin, end), `block` at a time; energies [blocks]: their sum of x^2.
  void (*input_edit)(const Input&, int64_t begin, int64_t end, int64_t block, const InputRule&, double* energies);
  // y = R x [vectors, size] for a symmetric R, of which the upper triangle is there
  void (*packed_times)(const float* packed, int64_t size, int64_t vectors, const double* x, double* y);
  // Whether n numbers of `bytes` each are finite: `exponent` has the bits that are all set in those that are not.
  bool (*finite)(const void* data, int64_t n, int64_t bytes, uint64_t exponent);
  void (*logprobs)(const Logits&, int64_t row, const LogProbs& out);
  void (*logprobs_backward)(const Logits&, int64_t row, const LogProbs& forward, const LogProbsGradient&);
};

// Memory of the calling thread, aligned to 64 bytes, valid until its next call. Sized by tile and K, never by N.
void* scratch(size_t bytes);

}  // namespace carerl::cpu
