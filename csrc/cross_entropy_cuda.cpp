// Binding that passes the tensors of igla_mega/ops/cross_entropy.py to the kernels of cross_entropy.cu on the caller's
// stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <tuple>

#include "cross_entropy.cuh"
#include "cross_entropy_check.h"
#include "cuda_binding.h"

namespace igla {
namespace {

Shard shard_of(const Tensor& logits, int64_t vocab_start, int64_t vocab_limit) {
  return {logits.size(0), logits.size(1), real_columns(logits, vocab_start, vocab_limit), vocab_start};
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor> softmax_statistics_cuda(const Tensor& logits, const Tensor& labels,
                                                           int64_t vocab_start, int64_t vocab_limit) {
  check_logits(logits);
  check_rows(logits, labels, "labels", ScalarType::Long);
  const DeviceGuard guard(logits.get_device_index());
  auto new_row = [&] { return torch::stable::new_empty(logits, {logits.size(0)}, ScalarType::Float); };
  Tensor row_max = new_row(), sum_exp = new_row(), target_logit = new_row();
  check_launch(launch_softmax_statistics(logits.const_data_ptr(), element_type(logits),
                                         static_cast<const int64_t*>(labels.const_data_ptr()),
                                         shard_of(logits, vocab_start, vocab_limit),
                                         static_cast<float*>(row_max.mutable_data_ptr()),
                                         static_cast<float*>(sum_exp.mutable_data_ptr()),
                                         static_cast<float*>(target_logit.mutable_data_ptr()), current_stream(logits)),
               "softmax_statistics");
  return {row_max, sum_exp, target_logit};
}

void softmax_gradient_cuda_(Tensor logits, const Tensor& lse, const Tensor& labels, const Tensor& weight,
                            int64_t vocab_start, int64_t vocab_limit) {
  check_logits(logits);
  check_rows(logits, lse, "lse", ScalarType::Float);
  check_rows(logits, labels, "labels", ScalarType::Long);
  check_rows(logits, weight, "weight", ScalarType::Float);
  const DeviceGuard guard(logits.get_device_index());
  check_launch(launch_softmax_gradient(logits.mutable_data_ptr(), element_type(logits),
                                       static_cast<const float*>(lse.const_data_ptr()),
                                       static_cast<const int64_t*>(labels.const_data_ptr()),
                                       static_cast<const float*>(weight.const_data_ptr()),
                                       shard_of(logits, vocab_start, vocab_limit), current_stream(logits)),
               "softmax_gradient_");
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CUDA, m) {
  m.impl("softmax_statistics", TORCH_BOX(&igla::softmax_statistics_cuda));
  m.impl("softmax_gradient_", TORCH_BOX(&igla::softmax_gradient_cuda_));
}
