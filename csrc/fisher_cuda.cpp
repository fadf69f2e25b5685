// Binding that passes the tensors of igla_mega/ops/fisher.py to the kernel of fisher.cu on the caller's stream.
#include <torch/csrc/stable/library.h>

#include <map>

#include "cuda_binding.h"
#include "fisher.cuh"
#include "fisher_check.h"

namespace igla {

void fisher_accumulate_cuda_(Tensors fisher, Tensors grads, double weight, bool zero_grads) {
  check_fisher(fisher, grads);
  if (fisher.empty()) return;
  const DeviceGuard guard(fisher[0].get_device_index());
  const cudaStream_t stream = current_stream(fisher[0]);
  std::map<ElementType, TensorTable<2>> tables;
  auto launch = [&](ElementType type, TensorTable<2>& table) {
    if (table.num_chunks() > 0)
      check_launch(launch_fisher_accumulate(table, type, weight, zero_grads, stream), "fisher_accumulate_");
    table = {};
  };
  for (size_t i = 0; i < fisher.size(); ++i) {
    const ElementType type = element_type(grads[i]);
    TensorTable<2>& table = tables[type];
    table.add({fisher[i].mutable_data_ptr(), grads[i].mutable_data_ptr()}, fisher[i].numel());
    if (table.full()) launch(type, table);
  }
  for (auto& [type, table] : tables) launch(type, table);
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CUDA, m) { m.impl("fisher_accumulate_", TORCH_BOX(&igla::fisher_accumulate_cuda_)); }
