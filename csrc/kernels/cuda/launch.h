// How a call is cut into slots and launches; shared by the translation units of the kernels.
#pragma once

#include <cuda_runtime.h>

#include <cstdint>
#include <vector>

#include "ops.h"

namespace carerl::cuda {

// A launch and its slots.
struct Table {
  Spans spans;
  int64_t slots;
};

// The launches of a call, and the slots of all of them.
struct Plan {
  std::vector<Table> tables;
  int64_t slots = 0;
};

// Slots of whole `unit`s of columns, `most` of them (and at least one a tensor).
Plan make_plan(const Call& call, int64_t unit, int64_t most);

// The same call with gradients [first, first + count) of its batch.
Call part_of_batch(const Call& call, int64_t first, int64_t count);

void check_launch(const char* op);

// Refuses sizes whose shared memory no GPU of this build offers to one block.
void check_shared(const char* op, int64_t bytes, const char* what);

constexpr int64_t kSharedAlways = 48 << 10;  // beyond, a kernel has to be told
constexpr int64_t kSharedMost = 96 << 10;    // what every GPU from sm_80 on has

template <class Kernel>
void allow_shared(const char* op, Kernel kernel, int64_t bytes) {
  check_shared(op, bytes, "this many rows and gradients");
  if (bytes <= kSharedAlways) return;
  // The same for every call: threads of the host may come together.
  if (cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kSharedMost) != cudaSuccess)
    check_launch(op);
}

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
inline int64_t round_up(int64_t a, int64_t to) { return ceil_div(a, to) * to; }

template <class T>
T* allocate(const Device& device, int64_t count) {
  return static_cast<T*>(device.memory.allocate(device.memory.context, count * static_cast<int64_t>(sizeof(T))));
}

inline cudaStream_t stream_of(const Device& device) { return static_cast<cudaStream_t>(device.stream); }

}  // namespace carerl::cuda
