// Argument checks of ops over lists of tensors, with the same error texts as igla_mega/ops/checks.py.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>
#include <initializer_list>
#include <ostream>
#include <string>
#include <vector>

namespace igla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Tensors = std::vector<Tensor>;
using Shape = torch::headeronly::IntHeaderOnlyArrayRef;

// Name of a tensor, such as `grads[3]`, or `out` for one outside a list. Formatted only if a check fails.
struct Name {
  const char* list;
  int64_t index = -1;
};

inline std::ostream& operator<<(std::ostream& to, const Name& name) {
  to << name.list;
  return name.index < 0 ? to : to << '[' << name.index << ']';
}

struct TypeName {
  ScalarType type;
};

inline std::ostream& operator<<(std::ostream& to, TypeName name) {
  switch (name.type) {
    case ScalarType::Float: return to << "float32";
    case ScalarType::Double: return to << "float64";
    case ScalarType::BFloat16: return to << "bfloat16";
    case ScalarType::Half: return to << "float16";
    default: return to << torch::headeronly::toString(name.type);
  }
}

struct TypeNames {
  const std::initializer_list<ScalarType>& types;
};

inline std::ostream& operator<<(std::ostream& to, TypeNames names) {
  for (const ScalarType* type = names.types.begin(); type != names.types.end(); ++type)
    to << (type == names.types.begin() ? "" : " or ") << TypeName{*type};
  return to;
}

struct ShapeName {
  Shape shape;
};

inline std::ostream& operator<<(std::ostream& to, ShapeName name) {
  to << '[';
  for (size_t i = 0; i < name.shape.size(); ++i) to << (i == 0 ? "" : ", ") << name.shape[i];
  return to << ']';
}

inline std::string device_name(const Tensor& tensor) {
  if (tensor.is_cpu()) return "cpu";
  return (tensor.is_cuda() ? "cuda:" : "another device, index ") + std::to_string(tensor.get_device_index());
}

inline void check_type(Name name, const Tensor& tensor, std::initializer_list<ScalarType> types) {
  const ScalarType type = tensor.scalar_type();
  STD_TORCH_CHECK(std::find(types.begin(), types.end(), type) != types.end(), name, " must be ", TypeNames{types},
                  ", got ", TypeName{type});
}

template <class Like>
void check_shape(Name name, const Tensor& tensor, Shape shape, const Like& like) {
  const Shape found = tensor.sizes();
  STD_TORCH_CHECK(found.size() == shape.size() && std::equal(found.begin(), found.end(), shape.begin()), name,
                  " must be ", ShapeName{shape}, " like ", like, ", got ", ShapeName{found});
}

inline void check_device(Name name, const Tensor& tensor, const Tensor& like, Name like_name) {
  STD_TORCH_CHECK(tensor.is_cuda() == like.is_cuda() && tensor.is_cpu() == like.is_cpu() &&
                      tensor.get_device_index() == like.get_device_index(),
                  name, " must be on the device of ", like_name, ", got ", device_name(tensor));
}

inline void check_contiguous(Name name, const Tensor& tensor) {
  STD_TORCH_CHECK(tensor.is_contiguous(), name, " must be contiguous; call .contiguous() first");
}

inline void check_rows(Name name, const Tensor& tensor) {
  const int64_t last = tensor.dim() - 1;
  STD_TORCH_CHECK(tensor.size(last) <= 1 || tensor.stride(last) == 1, name,
                  " must have stride 1 in its last dimension");
}

inline void check_not_expanded(Name name, const Tensor& tensor) {
  for (int64_t dim = 0; dim < tensor.dim(); ++dim)
    STD_TORCH_CHECK(tensor.size(dim) <= 1 || tensor.stride(dim) != 0, name, " is written, so must not be expanded");
}

}  // namespace igla
