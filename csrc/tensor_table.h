// Table of many tensors for one launch. It fits into the arguments of a kernel; each block processes one chunk.
#pragma once
#include <cstdint>

namespace igla {

constexpr int kTableTensors = 48;
// Elements per chunk.
constexpr int64_t kTableChunk = 32768;

inline int64_t table_chunks(int64_t size) { return (size + kTableChunk - 1) / kTableChunk; }

// Each tensor has kArrays arrays of equal size.
template <int kArrays>
struct TensorTable {
  void* data[kArrays][kTableTensors];
  int64_t size[kTableTensors];
  int64_t first_chunk[kTableTensors + 1]{};
  int num_tensors = 0;

  bool full() const { return num_tensors == kTableTensors; }
  int64_t num_chunks() const { return first_chunk[num_tensors]; }

  void add(void* const (&arrays)[kArrays], int64_t elements) {
    for (int i = 0; i < kArrays; ++i) data[i][num_tensors] = arrays[i];
    size[num_tensors] = elements;
    first_chunk[num_tensors + 1] = first_chunk[num_tensors] + table_chunks(elements);
    ++num_tensors;
  }
};

}  // namespace igla
