// Binding that passes the tensors of igla_mega/ops/accumulate.py to the kernel of accumulate.cu on the caller's stream.
#include <torch/csrc/stable/library.h>

#include <map>
#include <utility>

#include "accumulate.cuh"
#include "accumulate_check.h"
#include "cuda_binding.h"
#include "rows.h"

namespace igla {
namespace {

Addition addition_of(const Tensor& sum, const Tensor& term) {
  const int64_t row_dims = sum.dim() - 1;
  int64_t columns = sum.size(row_dims);
  const RowOrder order(sum, row_dims);
  RowSizes sizes = order.sizes;
  RowStrides sum_strides = order.strides(sum), term_strides = order.strides(term);
  join_rows(sizes, columns, sum_strides, term_strides);
  Addition addition{sum.mutable_data_ptr(), term.const_data_ptr(), columns, {}, {}, {}};
  std::copy(sizes.begin(), sizes.end(), addition.size);
  std::copy(sum_strides.begin(), sum_strides.end(), addition.sum_stride);
  std::copy(term_strides.begin(), term_strides.end(), addition.term_stride);
  return addition;
}

}  // namespace

void accumulate_cuda_(Tensors sums, Tensors terms) {
  check_accumulate(sums, terms);
  if (sums.empty()) return;
  const DeviceGuard guard(sums[0].get_device_index());
  const cudaStream_t stream = current_stream(sums[0]);
  using Types = std::pair<ElementType, ElementType>;
  std::map<Types, AdditionTable> tables;
  auto launch = [&](const Types& types, AdditionTable& table) {
    check_launch(launch_accumulate(table, types.first, types.second, stream), "accumulate_");
    table.num_additions = 0;
  };
  for (size_t i = 0; i < sums.size(); ++i) {
    const Types types{element_type(sums[i]), element_type(terms[i])};
    AdditionTable& table = tables[types];
    table.addition[table.num_additions++] = addition_of(sums[i], terms[i]);
    if (table.num_additions == kAddTensors) launch(types, table);
  }
  for (auto& [types, table] : tables) launch(types, table);
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CUDA, m) { m.impl("accumulate_", TORCH_BOX(&igla::accumulate_cuda_)); }
