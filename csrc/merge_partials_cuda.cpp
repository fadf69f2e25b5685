// Binding that passes the tensors of igla_mega/ops/merge_partials.py to the kernel of merge_partials.cu on the caller's
// stream.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include "cuda_binding.h"
#include "merge_partials.cuh"
#include "merge_partials_check.h"
#include "rows.h"

namespace igla {
namespace {

PartialRows rows_of(const Tensor& out, const Tensor& lse, const RowOrder& order) {
  PartialRows rows{const_cast<void*>(out.const_data_ptr()), const_cast<void*>(lse.const_data_ptr()), {}, {},
                   element_type(out)};
  const RowStrides out_strides = order.strides(out), lse_strides = order.strides(lse);
  std::copy(out_strides.begin(), out_strides.end(), rows.out_stride);
  std::copy(lse_strides.begin(), lse_strides.end(), rows.lse_stride);
  return rows;
}

}  // namespace

void merge_partials_cuda(Tensors outs, Tensors lses, Tensor out, Tensor lse, bool zero_means_empty) {
  check_merge(outs, lses, out, lse);
  const DeviceGuard guard(out.get_device_index());
  const bool wide = lse.scalar_type() == ScalarType::Double;
  const RowOrder order(out, kRowDims);
  MergeTable table{};
  std::copy(order.sizes.begin(), order.sizes.end(), table.size);
  table.columns = out.size(3);
  table.zero_means_empty = zero_means_empty;
  STD_TORCH_CHECK(table.num_rows() < (int64_t{1} << 31), "merge_partials takes less than 2^31 rows, got ",
                  table.num_rows());

  // With more partials than a table holds, the merged result so far is kept in the precision of the sum and becomes the
  // first partial of the next launch.
  Tensor so_far = out, so_far_lse = lse;
  for (size_t next = 0; next < outs.size();) {
    table.num_partials = 0;
    if (next > 0) table.partial[table.num_partials++] = rows_of(so_far, so_far_lse, order);
    while (next < outs.size() && table.num_partials < kMergePartials) {
      table.partial[table.num_partials++] = rows_of(outs[next], lses[next], order);
      ++next;
    }
    const bool last = next == outs.size();
    if (!last && table.num_partials == static_cast<int>(next)) {
      so_far = torch::stable::new_empty(out, out.sizes(), lse.scalar_type());
      so_far_lse = torch::stable::new_empty(lse, lse.sizes(), lse.scalar_type());
    }
    table.result = last ? rows_of(out, lse, order) : rows_of(so_far, so_far_lse, order);
    check_launch(launch_merge_partials(table, wide, current_stream(out)), "merge_partials");
  }
}

}  // namespace igla

STABLE_TORCH_LIBRARY_IMPL(igla, CUDA, m) { m.impl("merge_partials", TORCH_BOX(&igla::merge_partials_cuda)); }
