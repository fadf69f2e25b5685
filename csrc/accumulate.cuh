// Raw-pointer launcher of accumulate.cu, for the binding: no torch header on this side.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "element_type.h"

namespace igla {

constexpr int kAddTensors = 24;

// Rows of `columns` elements of a sum and of its term; strides in elements, the last of `size` innermost.
struct Addition {
  void* sum;
  const void* term;
  int64_t columns;
  int64_t size[3];
  int64_t sum_stride[3];
  int64_t term_stride[3];
};

struct AdditionTable {
  Addition addition[kAddTensors];
  int num_additions = 0;
};

// All sums of one type, fp32 or fp64, and all terms of one.
cudaError_t launch_accumulate(const AdditionTable& table, ElementType sum_type, ElementType term_type,
                              cudaStream_t stream);

}  // namespace igla
