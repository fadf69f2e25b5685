// Iteration of a block over its chunk of a TensorTable.
#pragma once
#include "elements.cuh"
#include "tensor_table.h"

namespace igla {

constexpr int kSweepThreads = 512;

struct Chunk {
  int tensor;
  int64_t begin;
  int64_t count;
};

template <int kArrays>
__device__ inline Chunk chunk_of_block(const TensorTable<kArrays>& table) {
  const int64_t chunk = blockIdx.x;
  int low = 0, high = table.num_tensors - 1;  // search the last tensor whose first chunk is not past this one
  while (low < high) {
    const int middle = (low + high + 1) / 2;
    if (table.first_chunk[middle] <= chunk)
      low = middle;
    else
      high = middle - 1;
  }
  const int64_t begin = (chunk - table.first_chunk[low]) * kTableChunk;
  const int64_t left = table.size[low] - begin;
  return {low, begin, left < kTableChunk ? left : kTableChunk};
}

__device__ inline bool aligned(const void* pointer) { return reinterpret_cast<uintptr_t>(pointer) % 16 == 0; }

template <int kElements>
struct Elements {
  static constexpr int value = kElements;
};

// Calls body(i, Elements<n>) for all `count` elements, n elements starting at i per call: a whole pack where every
// array is aligned to one, otherwise a single element. `lead` is the array of the narrowest type, whose packs are 16
// bytes.
template <class Lead, class Body, class... Others>
__device__ inline void sweep(int64_t count, const Body& body, const Lead* lead, const Others*... others) {
  const Split<Lead> split(lead, count);
  constexpr int kPack = Pack<Lead>::kSize;
  const bool packed = (aligned(others + split.head) && ...);
  const int64_t head = packed ? split.head : count, packs = packed ? split.packs : 0;
  for (int64_t i = threadIdx.x; i < head; i += kSweepThreads) body(i, Elements<1>{});
  for (int64_t i = threadIdx.x; i < packs; i += kSweepThreads) body(head + i * kPack, Elements<kPack>{});
  for (int64_t i = head + packs * kPack + threadIdx.x; i < count; i += kSweepThreads) body(i, Elements<1>{});
}

template <int kCount, class T>
__device__ inline Pack<T, kCount> read(const T* from) {
  return *reinterpret_cast<const Pack<T, kCount>*>(from);
}

template <int kCount, class T>
__device__ inline void put(T* to, const Pack<T, kCount>& pack) {
  *reinterpret_cast<Pack<T, kCount>*>(to) = pack;
}

}  // namespace igla
