// Splits many tensors of any sizes into one range of chunks that the threads share.
#pragma once
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <cstdint>
#include <vector>

namespace igla {

class Chunks {
 public:
  // Elements per chunk: four fp32 arrays of this length fit into the second-level cache.
  static constexpr int64_t kSize = 16384;

  explicit Chunks(std::vector<int64_t> sizes) : sizes_(std::move(sizes)) {
    for (const int64_t size : sizes_) first_.push_back(first_.back() + (size + kSize - 1) / kSize);
  }

  int64_t count() const { return first_.back(); }

  // Calls body(chunk, tensor, begin, count) for every chunk: the elements [begin, begin + count) of that tensor.
  template <class Body>
  void for_each(const Body& body) const {
    torch::stable::parallel_for(0, count(), 2, [&](int64_t first, int64_t last) {
      auto tensor = static_cast<size_t>(std::upper_bound(first_.begin(), first_.end(), first) - first_.begin() - 1);
      for (int64_t chunk = first; chunk < last; ++chunk) {
        while (chunk >= first_[tensor + 1]) ++tensor;
        const int64_t begin = (chunk - first_[tensor]) * kSize;
        body(chunk, tensor, begin, std::min(kSize, sizes_[tensor] - begin));
      }
    });
  }

 private:
  std::vector<int64_t> sizes_;
  std::vector<int64_t> first_{0};  // index of the first chunk of each tensor, then the number of chunks
};

}  // namespace igla
