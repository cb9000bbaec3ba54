// What the CUDA kernels and their callers agree on. Everything here is passed to kernels by value.
#pragma once

#include "../types.h"

namespace carerl::cuda {

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

// U <- q [U; G], rows from `rows` on become zero, through a table made of q beforehand: see prepare_rotation.
struct Rotation {
  const float* table;     // [tensors or 1, K + batch, padded rows]
  const int32_t* finite;  // [tensors or 1]
  int32_t padded;         // rows up to a multiple of 8
  int64_t seed;           // stochastic rounding where not 0
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

static_assert(sizeof(Spans) <= 3900 && sizeof(Matrices) + sizeof(InputRule) <= 4072, "room for the other parameters");

}  // namespace carerl::cuda
