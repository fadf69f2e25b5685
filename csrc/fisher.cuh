// Raw-pointer launcher of fisher.cu, for the binding: no torch header on this side.
#pragma once
#include <cuda_runtime.h>

#include "element_type.h"
#include "tensor_table.h"

namespace igla {

// Arrays of the table: fisher, grads. The type is that of grads; fisher is fp32, and fp64 for fp64.
cudaError_t launch_fisher_accumulate(const TensorTable<2>& table, ElementType type, double weight, bool zero_grads,
                                     cudaStream_t stream);

}  // namespace igla
