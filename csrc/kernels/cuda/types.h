// What the CUDA kernels and their callers agree on. Everything here is passed to kernels by value.
#pragma once

#include <stdint.h>

namespace carerl::cuda {

enum class DType : uint8_t { kF32, kBF16, kF16, kI8, kF8 };

static inline int64_t element_size(DType dtype) {
  return dtype == DType::kF32 ? 4 : dtype == DType::kBF16 || dtype == DType::kF16 ? 2 : 1;
}

// K rows of N elements, row after row. int8 and fp8 rows carry one fp32 scale per block of 1 << block_shift elements.
struct Basis {
  void* data;
  const float* scales;  // [rows, blocks], null unless int8 or fp8
  int64_t rows;
  int64_t stride;  // N
  int64_t blocks;
  int block_shift;
  DType dtype;
};

// One tensor of gradients: where it is, the column of the bases that belongs to its first element (a multiple of 128),
// and the first of the slots that it is cut into.
struct Span {
  void* grads;
  int64_t column, length, first_slot;
};

// Tensors, or weight matrices, of a launch: their table is among the parameters of the kernel, so that no copy is
// needed. These could be 32 KiB, but travel with every launch however short the list: 4 are taken. And an upper bound
// on the slots of a call. Tests need few of each.
#ifndef CARERL_SPANS
#define CARERL_SPANS 120
#define CARERL_MATRICES 480
#define CARERL_SLOTS (int64_t{1} << 40)
#endif
constexpr int kSpans = CARERL_SPANS;

// The tensors of a launch. A slot is a stretch of one tensor and the work of one block of threads; the slots of a call
// are numbered through all its launches. Their borders follow from shapes alone, and so do the bits of every sum.
struct Spans {
  Span span[kSpans];
  int64_t slot;         // elements of a slot
  int64_t stride;       // elements between gradients of a batch
  int32_t count;        // of spans
  int32_t batch;        // gradients of each span
  int32_t first_group;  // per-tensor arguments: index of the first span among all tensors; -1: all share one
  DType dtype;
};

// g <- scale * (g + mix U). A gradient with a non-finite number among its mix and scale is left alone.
struct Edit {
  const float* mix;    // [batch, rows], or [tensors, rows]
  const float* scale;  // [batch], or [tensors]
};

// U <- q [U; G], rows from `rows` on become zero, through a table made of q beforehand: see prepare_rotation.
struct Rotation {
  const float* table;     // [tensors or 1, K + batch, padded rows]
  const int32_t* finite;  // [tensors or 1]
  int32_t padded;         // rows up to a multiple of 8
  int64_t seed;           // stochastic rounding where not 0
};

// Weights of the literal rule: one number, or one per row.
struct Weights {
  double value;
  const float* rows;
};

struct Rule {
  Weights aligned, conflict, threshold;
  const void* root;  // [tensors or 1, K, K] or null for the sum combine
  bool root_is_double, root_per_group;
};

// Weight matrices of one shape, [outputs, inputs] or with `left` [inputs, outputs], and directions of their inputs.
constexpr int kMatrices = CARERL_MATRICES;  // of a launch
struct Matrices {
  void* matrix[kMatrices];
  const void* directions;  // [matrices of the call, count, inputs]
  int64_t outputs, inputs, count;
  int32_t first, matrices;  // of the launch, among those of the call
  bool left;
  DType dtype, direction_dtype;
};

// One number, or one per direction. Of the number of a weight the one less than it, its gain.
struct InputWeight {
  float value;
  const float* rows;
};

// What an output moves by: w <- w + x V, x a function of its coefficients c.
struct InputRule {
  const float* anchor;         // [matrices, outputs, count]: x = d - clip(d, -lower, upper), d = anchor - c;
  const float *lower, *upper;  // null: zero
  InputWeight aligned, conflict, threshold;  // without an anchor x = (weight - 1) c by the class of c
};

static_assert(sizeof(Spans) <= 3900 && sizeof(Matrices) + sizeof(InputRule) <= 4072, "room for the other parameters");

// Rows of logits and what is asked of each.
struct Logits {
  const void* data;
  int64_t rows, stride, vocabulary;  // elements between rows, elements of a row
  const int64_t* ids;                // [rows], the token of each row
  float inverse_temperature;
  DType dtype;
};

// Log-probability of the token and entropy of its row, [rows] each.
struct LogProbs {
  float *logp, *entropy;
};

// Gradients of those, and where the gradient of the logits goes, [rows, vocabulary] dense.
struct LogProbsGradient {
  const float *logp, *entropy;
  void* logits;
};

}  // namespace carerl::cuda
