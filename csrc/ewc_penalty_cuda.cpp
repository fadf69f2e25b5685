// Binding that passes the tensors of igla_mega/ops/ewc_penalty.py to the kernels of ewc_penalty.cu on the caller's
// stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <map>

#include "cuda_binding.h"
#include "ewc_penalty.cuh"
#include "ewc_penalty_check.h"

namespace igla {

Tensor ewc_pull_cuda_(Tensors grads, Tensors weights, Tensors anchors, Tensors fisher, double ewc_lambda) {
  check_ewc(grads, weights, anchors, fisher);
  STD_TORCH_CHECK(!weights.empty(), "ewc_pull_ on CUDA needs at least one tensor");
  const DeviceGuard guard(weights[0].get_device_index());
  const cudaStream_t stream = current_stream(weights[0]);
  int64_t num_chunks = 0;
  for (const Tensor& weight : weights) num_chunks += table_chunks(weight.numel());
  const Tensor partial = torch::stable::new_empty(weights[0], {num_chunks, kEwcSums}, ScalarType::Double);
  auto* to = static_cast<double*>(partial.mutable_data_ptr());

  std::map<ElementType, TensorTable<4>> tables;
  auto launch = [&](ElementType type, TensorTable<4>& table) {
    if (table.num_chunks() > 0) check_launch(launch_ewc_pull(table, type, ewc_lambda, to, stream), "ewc_pull_");
    to += table.num_chunks() * kEwcSums;
    table = {};
  };
  for (size_t i = 0; i < weights.size(); ++i) {
    const ElementType type = element_type(grads[i]);
    TensorTable<4>& table = tables[type];
    table.add({grads[i].mutable_data_ptr(), const_cast<void*>(weights[i].const_data_ptr()),
               const_cast<void*>(anchors[i].const_data_ptr()), const_cast<void*>(fisher[i].const_data_ptr())},
              weights[i].numel());
    if (table.full()) launch(type, table);
  }
  for (auto& [type, table] : tables) launch(type, table);

  Tensor sums = torch::stable::new_empty(weights[0], {kEwcSums}, ScalarType::Double);
  check_launch(launch_ewc_sums(static_cast<const double*>(partial.const_data_ptr()), num_chunks,
                               static_cast<double*>(sums.mutable_data_ptr()), stream),
               "ewc_pull_");
  return sums;
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CUDA, m) { m.impl("ewc_pull_", TORCH_BOX(&igla::ewc_pull_cuda_)); }
