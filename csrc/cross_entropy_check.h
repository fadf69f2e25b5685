// Argument checks shared by the CPU and CUDA bindings of igla_mega/ops/cross_entropy.py, with the reference's error
// texts.
#pragma once
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cstdint>

namespace igla {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline void check_logits(const Tensor& logits) {
  STD_TORCH_CHECK(logits.dim() == 2, "logits must be [tokens, columns], got ", logits.dim(), " dimensions");
  const ScalarType type = logits.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::BFloat16 || type == ScalarType::Half,
                  "logits must be float32, bfloat16 or float16");
  STD_TORCH_CHECK(logits.is_contiguous(), "logits must be contiguous; call .contiguous() first");
}

inline void check_rows(const Tensor& logits, const Tensor& rows, const char* name, ScalarType type) {
  STD_TORCH_CHECK(rows.scalar_type() == type, name, " must be ", type == ScalarType::Long ? "int64" : "float32");
  STD_TORCH_CHECK(rows.is_contiguous(), name, " must be contiguous; call .contiguous() first");
  STD_TORCH_CHECK(rows.dim() == 1 && rows.size(0) == logits.size(0), name, " must have one entry for each of the ",
                  logits.size(0), " rows of logits");
  STD_TORCH_CHECK(rows.is_cuda() == logits.is_cuda() && rows.get_device_index() == logits.get_device_index(), name,
                  " must be on the device of logits");
}

// Returns the number of columns of this shard that are not padding.
inline int64_t real_columns(const Tensor& logits, int64_t vocab_start, int64_t vocab_limit) {
  return std::max<int64_t>(0, std::min<int64_t>(logits.size(1), vocab_limit - vocab_start));
}

}  // namespace igla
