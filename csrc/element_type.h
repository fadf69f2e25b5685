// Element types that the bindings pass to the CUDA kernels, without torch headers.
#pragma once

namespace igla {

enum class ElementType { kFloat32, kBfloat16, kFloat16, kFloat64 };

inline int element_bytes(ElementType type) {
  if (type == ElementType::kFloat64) return 8;
  return type == ElementType::kFloat32 ? 4 : 2;
}

}  // namespace igla
