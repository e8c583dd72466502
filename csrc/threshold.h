// Dynamic thresholding (Saharia et al. 2022, arXiv:2205.11487, section 2.3): what its kernels on a CPU and on a GPU
// have in common. Host and device, no torch.
//
//   s   = clamp(quantile(|x0|, ratio), 1, max_value)        of each sample
//   x0' = clamp(x0, -s, s) / s
//
// The quantile is selected, not sorted for: the bits of |x| order as the numbers do, so each level of a radix search
// counts one group of them, from the most significant on, among the elements that agree with the quantile in all groups
// before. Counts are integers, so how the work is cut does not show. Rank, interpolation and NaN are those of
// torch.quantile.
#pragma once

#include "call.h"

namespace fastdiff {

struct ThresholdCall : Call, Shape {
  Operand out, x;
  double ratio = 0, max_value = 0;
};

// The bits of |x|. NaN is the largest, and there is one of it.
template <class T>
struct KeyOf;
template <>
struct KeyOf<float> {
  using Type = uint32_t;
  static constexpr int kBits = 31;
  static constexpr Type kInf = 0x7F800000u;
  static constexpr int kLevels = 3;
};
template <>
struct KeyOf<double> {
  using Type = uint64_t;
  static constexpr int kBits = 63;
  static constexpr Type kInf = 0x7FF0000000000000u;
  static constexpr int kLevels = 6;
};
template <class T>
using Key = typename KeyOf<T>::Type;
template <class T>
constexpr Key<T> kNanKey = (Key<T>(1) << KeyOf<T>::kBits) - 1;

template <class T>
FASTDIFF_HD Key<T> key_of(T value) {
  const Key<T> key = bit_cast<Key<T>>(value) & kNanKey<T>;
  return key > KeyOf<T>::kInf ? kNanKey<T> : key;
}

template <class T>
FASTDIFF_HD T value_of(Key<T> key) {
  return bit_cast<T>(key);
}

constexpr int kMostBins = 2048;  // of a level

// How many bits lie below the group of a level: of 31 bits 20, 10 and 0; of 63 bits 52, 41, 30, 20, 10 and 0.
template <class T>
FASTDIFF_HD constexpr int shift_of(int level) {
  const int levels_after = KeyOf<T>::kLevels - 1 - level;
  return levels_after <= 3 ? 10 * levels_after : 30 + 11 * (levels_after - 3);
}

// Those below the groups of all levels before.
template <class T>
FASTDIFF_HD constexpr int shift_before(int level) {
  return level == 0 ? KeyOf<T>::kBits : shift_of<T>(level - 1);
}

template <class T>
FASTDIFF_HD constexpr int bins_of(int level) {
  return 1 << (shift_before<T>(level) - shift_of<T>(level));
}

static_assert(shift_of<float>(0) == 20 && bins_of<float>(0) == kMostBins && bins_of<float>(1) == 1024, "");
static_assert(shift_of<double>(0) == 52 && bins_of<double>(0) == kMostBins && bins_of<double>(5) == 1024, "");

// The level after which no bits are left: those of half types are few.
template <class T>
FASTDIFF_HD int last_level_of(DType dtype) {
  const bool half = dtype == DType::kFloat16 || dtype == DType::kBFloat16;
  return half ? 1 : KeyOf<T>::kLevels - 1;
}

// Where among a sample's n ordered elements its quantile lies: at `below`, or, by `weight`, between it and the next.
template <class T>
struct Rank {
  int64_t below;
  T weight;

  FASTDIFF_HD int64_t above() const { return below + (weight > T(0)); }
};

// float32 holds every rank up to 2^24; further on torch.quantile gives up, and the rank is taken in float64.
template <class T>
FASTDIFF_HD Rank<T> rank_of(int64_t n, double ratio) {
  const int64_t last = n - 1;
  if (n > int64_t(1) << 24) {
    const double rank = ratio * double(last);
    const int64_t below = int64_t(rank);
    return {below, T(rank - double(below))};
  }
  const T rank = T(ratio) * T(last);
  const int64_t below = int64_t(rank);
  return {below, rank - T(below)};
}

FASTDIFF_HD float fused(float a, float b, float c) { return fma_exact(a, b, c); }
FASTDIFF_HD double fused(double a, double b, double c) {
#if defined(__CUDA_ARCH__)
  return __fma_rn(a, b, c);
#else
  return __builtin_fma(a, b, c);
#endif
}

// torch.lerp, which fuses as well.
template <class T>
FASTDIFF_HD T interpolate(T low, T high, T weight) {
  const bool near_low = weight < T(0.5);
  return fused(near_low ? weight : weight - T(1), high - low, near_low ? low : high);
}

// The bound of a sample from its quantile; NaN stays.
template <class T>
FASTDIFF_HD T bound_of(T quantile, T max_value) {
  const T s = quantile < T(1) ? T(1) : quantile;
  return s > max_value ? max_value : s;
}

// Whether counts alone tell the bound of a sample without NaN. They need not be exact, but elements that are not
// counted as finite or at most 1 are taken not to be, and those that are not counted as under max_value to be at least
// that.
template <class T>
FASTDIFF_HD bool settle(const Rank<T>& rank, int64_t finite, int64_t at_most_one, int64_t under_max, T max_value,
                        T& bound) {
  if (rank.above() >= finite) return false;  // Inf may meet Inf
  if (max_value <= T(1) || rank.below >= under_max) {
    bound = max_value;
  } else if (rank.above() < at_most_one) {
    bound = T(1);
  } else {
    return false;
  }
  return true;
}

template <class T>
FASTDIFF_HD T thresholded(T x, T bound) {
  const T at_least = x < -bound ? -bound : x;
  return (at_least > bound ? bound : at_least) / bound;
}

}  // namespace fastdiff
