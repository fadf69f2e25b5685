// Raw-pointer launchers of ewc_penalty.cu, for the binding: no torch header on this side.
#pragma once
#include <cuda_runtime.h>

#include "element_type.h"
#include "tensor_table.h"

namespace igla {

constexpr int kEwcSums = 3;

// Arrays of the table: grads, weights, anchors, fisher. The type is that of grads; the others are fp32, and fp64 for
// fp64. `partial` [chunks of the table, 3] gets twice the penalty, the squares of the gradients and those of the pull.
cudaError_t launch_ewc_pull(const TensorTable<4>& table, ElementType type, double ewc_lambda, double* partial,
                            cudaStream_t stream);

// Joins all partial sums, in an order that does not vary, into `sums` [3], the first halved.
cudaError_t launch_ewc_sums(const double* partial, int64_t num_chunks, double* sums, cudaStream_t stream);

}  // namespace igla
