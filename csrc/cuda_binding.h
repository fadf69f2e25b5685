// Shared by all CUDA bindings: the caller's device and stream, element types, checked launches.
#pragma once
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include "element_type.h"

namespace igla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::accelerator::DeviceGuard;

inline ElementType element_type(const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::BFloat16: return ElementType::kBfloat16;
    case ScalarType::Half: return ElementType::kFloat16;
    case ScalarType::Double: return ElementType::kFloat64;
    default: return ElementType::kFloat32;
  }
}

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream) == AOTI_TORCH_SUCCESS,
                  "torch gave no CUDA stream for device ", static_cast<int>(tensor.get_device_index()));
  return static_cast<cudaStream_t>(stream);
}

inline void check_launch(cudaError_t error, const char* op) {
  STD_TORCH_CHECK(error == cudaSuccess, op, ": launch failed, ", cudaGetErrorString(error));
}

}  // namespace igla
