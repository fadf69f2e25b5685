// Vectors of fp32 or fp64 lanes, as wide as the target allows. They use the compiler's vector types, so nothing has to
// be ported to another instruction set.
#pragma once
#include <torch/headeronly/util/Half.h>

#include <bit>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <type_traits>

namespace igla {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(float));

using Vec = float __attribute__((vector_size(kVectorBytes)));
using IntVec = int32_t __attribute__((vector_size(kVectorBytes)));
using UintVec = uint32_t __attribute__((vector_size(kVectorBytes)));
using HalfWidthVec = uint16_t __attribute__((vector_size(kVectorBytes / 2)));
using DoubleVec = double __attribute__((vector_size(kVectorBytes)));

// Bits of a bfloat16: the upper half of an fp32.
struct Bfloat16 {
  uint16_t bits;
};
using Half = torch::headeronly::Half;

// Type in which an element is computed: fp32 (fp64 for fp64).
template <class T>
using Wide = std::conditional_t<std::is_same_v<T, double>, double, float>;
// Number of elements of type T in a vector.
template <class T>
constexpr int kLanesOf = kVectorBytes / static_cast<int>(sizeof(Wide<T>));

inline Vec broadcast(float x) { return Vec{} + x; }
inline DoubleVec broadcast(double x) { return DoubleVec{} + x; }

inline Vec load(const float* from) {
  Vec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline Vec load(const Bfloat16* from) {
  HalfWidthVec bits;
  std::memcpy(&bits, from, sizeof(bits));
  const UintVec wide = __builtin_convertvector(bits, UintVec) << 16;
  return std::bit_cast<Vec>(wide);
}

inline Vec load(const Half* from) {
  Vec v;
  for (int lane = 0; lane < kLanes; ++lane) v[lane] = static_cast<float>(from[lane]);
  return v;
}

inline DoubleVec load(const double* from) {
  DoubleVec v;
  std::memcpy(&v, from, sizeof(v));
  return v;
}

inline void store(double* to, DoubleVec v) { std::memcpy(to, &v, sizeof(v)); }

inline void store(float* to, Vec v) { std::memcpy(to, &v, sizeof(v)); }

inline void store(Bfloat16* to, Vec v) {
  const UintVec bits = std::bit_cast<UintVec>(v);
  const UintVec rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;  // to nearest, ties to even
  const UintVec nan = UintVec{} + 0x7fc0u;
  const HalfWidthVec narrow = __builtin_convertvector(v == v ? rounded : nan, HalfWidthVec);
  std::memcpy(to, &narrow, sizeof(narrow));
}

inline void store(Half* to, Vec v) {
  for (int lane = 0; lane < kLanes; ++lane) to[lane] = Half(v[lane]);
}

// Loads the first `count` < kLanesOf<T> elements; the other lanes are set to `fill`.
template <class T>
inline auto load_part(const T* from, int64_t count, Wide<T> fill) {
  T padded[kLanesOf<T>];
  store(padded, broadcast(fill));
  std::memcpy(static_cast<void*>(padded), from, static_cast<size_t>(count) * sizeof(T));
  return load(padded);
}

template <class T, class V>
inline void store_part(T* to, int64_t count, V v) {
  T padded[kLanesOf<T>];
  store(padded, v);
  std::memcpy(static_cast<void*>(to), padded, static_cast<size_t>(count) * sizeof(T));
}

// Lane-wise maximum. A NaN is kept only if it is in `v`.
inline Vec maximum(Vec a, Vec v) { return a > v ? a : v; }

// Returns exp(x) to 2 ulp for -87.3 < x < 88.3; 0 below, inf above, NaN for NaN.
// Cody-Waite reduction to |r| <= ln(2)/2 and the degree-5 polynomial of Cephes' expf.
inline Vec exp(Vec x) {
  const Vec clamped = x < -88.0f ? broadcast(-88.0f) : (x > 89.0f ? broadcast(89.0f) : x);
  const float to_integer = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low mantissa bits
  const Vec shifted = clamped * 1.44269504088896341f + to_integer;
  const Vec n = shifted - to_integer;
  const Vec r = clamped - n * 0.693359375f + n * 2.12194440e-4f;
  Vec p = broadcast(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // 2^n from its exponent bits: n = -127 gives 0 and n = 128 gives inf.
  const IntVec exponent = (std::bit_cast<IntVec>(shifted) + 127) << 23;
  return p * std::bit_cast<Vec>(exponent);
}

inline DoubleVec exp(DoubleVec x) {
  for (int lane = 0; lane < kLanesOf<double>; ++lane) x[lane] = std::exp(x[lane]);
  return x;
}

inline float sum_lanes(Vec v) {
  float sum = 0.0f;
  for (int lane = 0; lane < kLanes; ++lane) sum += v[lane];
  return sum;
}

inline float max_lanes(Vec v) {
  float most = -std::numeric_limits<float>::infinity();
  for (int lane = 0; lane < kLanes; ++lane) most = v[lane] > most ? v[lane] : most;
  return most;
}

}  // namespace igla
