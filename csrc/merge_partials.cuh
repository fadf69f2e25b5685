// Raw-pointer launcher of merge_partials.cu for the binding, so that nvcc compiles no torch headers.
#pragma once
#include <cuda_runtime.h>

#include <cstdint>

#include "element_type.h"

namespace igla {

constexpr int kMergePartials = 32;

// Rows of one out tensor and their lses; strides in elements, the last one innermost.
struct PartialRows {
  void* out;  // written only in the result
  void* lse;
  int64_t out_stride[3];
  int64_t lse_stride[3];
  ElementType type;
};

struct MergeTable {
  PartialRows partial[kMergePartials];
  PartialRows result;
  int64_t size[3];
  int64_t columns;
  int num_partials;
  bool zero_means_empty;

  int64_t num_rows() const { return size[0] * size[1] * size[2]; }
};

// `wide`: true if every tensor is fp64; otherwise every lse is fp32. At most 2^31 - 1 rows.
cudaError_t launch_merge_partials(const MergeTable& table, bool wide, cudaStream_t stream);

}  // namespace igla
