// Index arithmetic of the data path that is too slow in Python. Works on numpy arrays, without torch headers.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>

#include <cstdint>
#include <functional>
#include <queue>
#include <stdexcept>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace {

using Counts = py::array_t<int64_t, py::array::c_style | py::array::forcecast>;
using Entry = std::pair<int64_t, int64_t>;  // (slot, source), ordered by the earliest slot, then the lowest source
using Queue = std::priority_queue<Entry, std::vector<Entry>, std::greater<Entry>>;

// Orders sum(counts) slots so that every prefix of n slots holds each source s within one of n * counts[s] / sum. Item
// j of a source may be placed from slot floor(j * sum / count) to slot ceil((j + 1) * sum / count) - 1; among the items
// that may be placed, the one with the earliest last slot is placed first (Tijdeman 1980, as a deadline schedule).
py::array_t<int32_t> blend_schedule(const Counts& counts) {
  if (counts.ndim() != 1) throw std::invalid_argument("counts must be one-dimensional");
  const int64_t num_sources = counts.shape(0);
  const int64_t* count = counts.data();
  int64_t total = 0;
  for (int64_t s = 0; s < num_sources; ++s) {
    if (count[s] < 0) throw std::invalid_argument("counts must not be negative");
    total += count[s];
  }
  // (j + 1) * total must fit into 64 bits.
  if (total > (int64_t{1} << 31)) throw std::invalid_argument("counts add up to more than 2^31 slots");

  py::array_t<int32_t> schedule(total);
  int32_t* out = schedule.mutable_data();
  const py::gil_scoped_release unlocked;
  std::vector<int64_t> placed(static_cast<size_t>(num_sources), 0);
  Queue waiting, ready;
  for (int64_t s = 0; s < num_sources; ++s)
    if (count[s] > 0) waiting.emplace(0, s);
  for (int64_t slot = 0; slot < total; ++slot) {
    while (!waiting.empty() && waiting.top().first <= slot) {
      const int64_t s = waiting.top().second;
      waiting.pop();
      ready.emplace(((placed[s] + 1) * total + count[s] - 1) / count[s] - 1, s);
    }
    const int64_t s = ready.top().second;
    ready.pop();
    out[slot] = static_cast<int32_t>(s);
    if (++placed[s] < count[s]) waiting.emplace(placed[s] * total / count[s], s);
  }
  return schedule;
}

}  // namespace

PYBIND11_MODULE(_helpers, m) {
  m.def("blend_schedule", &blend_schedule, py::arg("counts"),
        "Source of each of the sum(counts) slots; every prefix holds each source within one of its share. int32.");
}
