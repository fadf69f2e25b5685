// Raw-pointer launchers of cross_entropy.cu for the binding, so that nvcc compiles no torch headers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "element_type.h"

namespace igla {

struct Shard {
  int64_t num_rows;
  int64_t stride;       // columns in memory
  int64_t columns;      // columns that are not padding
  int64_t vocab_start;  // global id of column 0
};

cudaError_t launch_softmax_statistics(const void* logits, ElementType type, const int64_t* labels, const Shard& shard,
                                      float* row_max, float* sum_exp, float* target_logit, cudaStream_t stream);

cudaError_t launch_softmax_gradient(void* logits, ElementType type, const float* lse, const int64_t* labels,
                                    const float* weight, const Shard& shard, cudaStream_t stream);

}  // namespace igla
