// Raw-pointer launcher of fisher.cu for the binding, so that nvcc compiles no torch headers.
#pragma once
#include <cuda_runtime.h>

#include "element_type.h"
#include "tensor_table.h"

namespace igla {

// Arrays of the table: fisher, grads. `type` is the type of grads; fisher is fp32 (fp64 for fp64).
cudaError_t launch_fisher_accumulate(const TensorTable<2>& table, ElementType type, double weight, bool zero_grads,
                                     cudaStream_t stream);

}  // namespace igla
