// Raw-pointer launcher of accumulate.cu for the binding, so that nvcc compiles no torch headers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "element_type.h"

namespace igla {

constexpr int kAddTensors = 24;

// A sum and its term as rows of `columns` elements; strides in elements, the last entry of `size` is the innermost.
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

// All sums must have one type (fp32 or fp64), and all terms one type.
cudaError_t launch_accumulate(const AdditionTable& table, ElementType sum_type, ElementType term_type,
                              cudaStream_t stream);

}  // namespace igla
