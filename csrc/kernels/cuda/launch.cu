#include "launch.h"

#include <algorithm>
#include <stdexcept>
#include <string>

namespace carerl::cuda {

Plan make_plan(const Call& call, int64_t unit, int64_t most) {
  int64_t units = 0;
  for (const Span& span : call.spans) units += ceil_div(span.length, unit);
  const int64_t slot = unit * std::max<int64_t>(ceil_div(units, std::min(most, CARERL_SLOTS)), 1);
  Plan plan;
  const int64_t count = static_cast<int64_t>(call.spans.size());
  for (int64_t first = 0; first < count; first += kSpans) {
    Table table{};
    Spans& spans = table.spans;
    spans.count = static_cast<int32_t>(std::min<int64_t>(count - first, kSpans));
    spans.slot = slot;
    spans.stride = call.stride;
    spans.batch = static_cast<int32_t>(call.batch);
    spans.first_group = call.per_tensor ? static_cast<int32_t>(first) : -1;
    spans.dtype = call.dtype;
    const int64_t before = plan.slots;
    for (int64_t i = 0; i < spans.count; ++i) {
      spans.span[i] = call.spans[first + i];
      spans.span[i].first_slot = plan.slots;
      plan.slots += ceil_div(spans.span[i].length, slot);
    }
    table.slots = plan.slots - before;
    plan.tables.push_back(table);
  }
  return plan;
}

Call part_of_batch(const Call& call, int64_t first, int64_t count) {
  Call part = call;
  part.batch = count;
  for (Span& span : part.spans) {
    span.grads = static_cast<char*>(span.grads) + first * call.stride * element_size(call.dtype);
  }
  return part;
}

void check_shared(const char* op, int64_t bytes, const char* what) {
  if (bytes <= kSharedMost) return;
  throw std::runtime_error(std::string("carerl::") + op + ": expected sizes that fit into " +
                           std::to_string(kSharedMost >> 10) + " KiB of shared memory on CUDA, found " + what +
                           " to need " + std::to_string(bytes >> 10) + "; pass fewer of them in one call");
}

void check_launch(const char* op) {
  const cudaError_t error = cudaGetLastError();
  if (error == cudaSuccess) return;
  std::string text = std::string("carerl::") + op + ": ";
  if (error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction ||
      error == cudaErrorUnsupportedPtxVersion) {
    int device = 0, major = 0, minor = 0;
    cudaGetDevice(&device);
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    text += "expected a GPU of the architectures " CARERL_CUDA_ARCHITECTURES " or later, found sm_" +
            std::to_string(10 * major + minor) + " (" + cudaGetErrorString(error) +
            "); rebuild with CARERL_CUDA_ARCHITECTURES=" + std::to_string(10 * major + minor) +
            ", or set CARERL_BACKEND=triton or reference";
  } else if (error == cudaErrorInsufficientDriver) {
    int driver = 0;
    cudaDriverGetVersion(&driver);
    text += "expected an NVIDIA driver for CUDA " + std::to_string(CUDART_VERSION / 1000) + "." +
            std::to_string(CUDART_VERSION % 1000 / 10) + " or later, found one for CUDA " +
            std::to_string(driver / 1000) + "." + std::to_string(driver % 1000 / 10) +
            "; update the driver, or set CARERL_BACKEND=triton or reference";
  } else {
    text += std::string("the CUDA kernel was not launched: ") + cudaGetErrorString(error);
  }
  throw std::runtime_error(text);
}

}  // namespace carerl::cuda
