// Threads of torch for the CPU kernels.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "../kernels/cpu/ops.h"

namespace carerl {

inline void run_on_pool(int count, void (*body)(void*, int), void* context) {
  torch::stable::parallel_for(0, count, 1, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) body(context, static_cast<int>(i));
  });
}

inline cpu::Pool pool() { return {static_cast<int>(torch::stable::get_num_threads()), run_on_pool}; }

}  // namespace carerl
