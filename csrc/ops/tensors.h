// Between torch's tensors and the kernels' pointers.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <vector>

#include "../kernels/types.h"
#include "checks.h"

namespace carerl {

inline DType dtype_of(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16:
      return DType::kBF16;
    case ScalarType::Half:
      return DType::kF16;
    case ScalarType::Char:
      return DType::kI8;
    case ScalarType::Float8_e4m3fn:
      return DType::kF8;
    default:
      return DType::kF32;
  }
}

// Contiguous, uninitialised, on the device of `like` or the CPU. The C shim directly: 0.4 us, where
// torch::stable::empty looks its op up by name.
inline Tensor empty(const std::vector<int64_t>& sizes, ScalarType dtype, const Tensor* like = nullptr) {
  std::vector<int64_t> strides(sizes.size());
  int64_t stride = 1;
  for (size_t i = sizes.size(); i-- > 0;) {
    strides[i] = stride;
    stride *= std::max<int64_t>(sizes[i], 1);
  }
  const int32_t type = dtype == ScalarType::Double          ? aoti_torch_dtype_float64()
                       : dtype == ScalarType::Float         ? aoti_torch_dtype_float32()
                       : dtype == ScalarType::BFloat16      ? aoti_torch_dtype_bfloat16()
                       : dtype == ScalarType::Half          ? aoti_torch_dtype_float16()
                       : dtype == ScalarType::Bool          ? aoti_torch_dtype_bool()
                       : dtype == ScalarType::Float8_e4m3fn ? aoti_torch_dtype_float8_e4m3fn()
                                                            : aoti_torch_dtype_int8();
  int32_t device = aoti_torch_device_type_cpu(), index = 0;
  if (like != nullptr) {
    CARERL_SHIM(aoti_torch_get_device_type(like->get(), &device));
    CARERL_SHIM(aoti_torch_get_device_index(like->get(), &index));
  }
  AtenTensorHandle out = nullptr;
  CARERL_SHIM(aoti_torch_empty_strided(static_cast<int64_t>(sizes.size()), sizes.data(), strides.data(), type, device,
                                       index, &out));
  return Tensor(out);
}

template <class T>
T* data(const Tensor& tensor) {
  return static_cast<T*>(tensor.data_ptr());
}

inline std::vector<void*> pointers(const List& tensors) {
  std::vector<void*> out;
  out.reserve(tensors.size());
  for (const Tensor& tensor : tensors) out.push_back(tensor.data_ptr());
  return out;
}

}  // namespace carerl
