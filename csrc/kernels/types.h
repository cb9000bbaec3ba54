// What the kernels of every backend and their callers agree on. Passed to GPU kernels by value, and compiled into one
// translation unit per instruction set of the CPU, hence no header of torch and no template of std.
#pragma once

#include <stdint.h>

namespace carerl {

enum class DType : uint8_t { kF32, kBF16, kF16, kI8, kF8 };  // kF8: float8_e4m3fn

static inline int64_t element_size(DType dtype) { return dtype == DType::kF32 ? 4 : dtype >= DType::kI8 ? 1 : 2; }

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

// g <- scale * (g + mix U). A gradient with a non-finite number among its mix and scale is left alone.
struct Edit {
  const float* mix;    // [batch, rows], or [tensors, rows]
  const float* scale;  // [batch], or [tensors]
};

// Weights of the sign rule: one number, or one per row.
struct Weights {
  double value;
  const float* rows;
};

struct Rule {
  Weights aligned, conflict, threshold;
  const void* root;  // [tensors or 1, K, K] or null for the sum combine
  bool root_is_double, root_per_group;
};

// One number, or one per direction. Of the number of a weight the one less than it, its gain.
struct InputWeight {
  float value;
  const float* rows;
};

// What an output moves by: w <- w + x V, x a function of its coefficients c.
struct InputRule {
  const float* anchor;         // [matrices, outputs, count]: x = d - clip(d, -lower, upper) with d = anchor - c;
  const float *lower, *upper;  // null: zero
  InputWeight aligned, conflict, threshold;  // without an anchor x = (weight - 1) c by the class of c
};

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

}  // namespace carerl
