// Raw-pointer launchers of ewc_penalty.cu for the binding, so that nvcc compiles no torch headers.
#pragma once
#include <cuda_runtime.h>

#include "element_type.h"
#include "tensor_table.h"

namespace igla {

constexpr int kEwcSums = 3;

// Arrays of the table: grads, weights, anchors, fisher. `type` is the type of grads; the others are fp32 (fp64 for
// fp64). `partial` [chunks of the table, 3] receives twice the penalty and the sums of squares of the gradients and of
// the pull.
cudaError_t launch_ewc_pull(const TensorTable<4>& table, ElementType type, double ewc_lambda, double* partial,
                            cudaStream_t stream);

// Adds all partial sums in a fixed order into `sums` [3]; the first, twice the penalty, is halved.
cudaError_t launch_ewc_sums(const double* partial, int64_t num_chunks, double* sums, cudaStream_t stream);

}  // namespace igla
