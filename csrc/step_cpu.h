// How a call is cut into pieces for the loops of step_cpu.cpp, which is compiled once per instruction set. No torch.
#pragma once

#include "threshold.h"

namespace fastdiff {

// Work is cut into units of one sample that do not depend on each other: runs of kUnit elements, or, in channels-last
// order, runs of whole columns.
constexpr int64_t kUnit = 4096;
constexpr int64_t kTile = 8192;        // elements of a channels-last tile
constexpr int64_t kTileRows = 64;      // at most; fewer, longer runs of noise are cheaper,
constexpr int64_t kTileColumns = 512;  // up to one full block of Philox counters

struct Tiling {
  int64_t rows, columns;
};

FASTDIFF_HD Tiling tiling(const Shape& shape) {
  const int64_t rows = shape.sizes[0], columns = shape.sizes[1];
  if (columns <= kTileColumns) {
    // Short rows: whole ones, whose noise is one run.
    const int64_t fit = kTile / columns;
    return {rows < fit ? rows : fit, columns};
  }
  const int64_t tile_rows = rows < kTileRows ? rows : kTileRows;
  const int64_t fit = kTile / tile_rows / 64 * 64;  // whole groups of Philox counters
  return {tile_rows, fit < kTileColumns ? fit : kTileColumns};
}

template <class AnyCall>
FASTDIFF_HD int64_t units_per_sample(const AnyCall& call) {
  if (call.layout != Layout::kChannelsLast) return (call.sample + kUnit - 1) / kUnit;
  const int64_t columns = tiling(call).columns;
  return (call.sizes[1] + columns - 1) / columns;
}

template <class AnyCall>
FASTDIFF_HD int64_t units_of(const AnyCall& call) {
  return call.batch * units_per_sample(call);
}
FASTDIFF_HD int64_t units_of(const NormalsCall& call) { return (call.batch * call.sample + kUnit - 1) / kUnit; }

// The units [begin, end); those of a step and of its backward are numbered sample * units_per_sample + unit of the
// sample.
using StepUnits = void (*)(const StepCall&, int64_t begin, int64_t end);
using StepBackwardUnits = void (*)(const BackwardCall&, int64_t begin, int64_t end);
using DistanceUnits = void (*)(const DistanceCall&, int64_t begin, int64_t end);
using SumsUnits = void (*)(const SumsCall&, int64_t begin, int64_t end);
using NormalsUnits = void (*)(const NormalsCall&, int64_t begin, int64_t end);

// What the elements of a sample are like, or part of them.
struct ThresholdCounts {
  int64_t at_most_one = 0, under_max = 0;
  uint64_t highest = 0;  // key
};

// The elements of a level of the search that agree with the quantile in the levels before, whose bits are `prefix`.
struct ThresholdLevel {
  int index;
  uint64_t prefix;
  uint32_t counts[kMostBins];
  uint64_t next;  // the least key with a greater prefix
};

// Elements [first, last) of sample b, in any order that is the same for all of these: their counts, added to those that
// there are, the same at a level, and the result for a bound.
using ThresholdCount = void (*)(const ThresholdCall&, int64_t b, int64_t first, int64_t last, ThresholdCounts&);
using ThresholdSearch = void (*)(const ThresholdCall&, int64_t b, int64_t first, int64_t last, ThresholdLevel&);
using ThresholdApply = void (*)(const ThresholdCall&, int64_t b, int64_t first, int64_t last, double bound);

struct Kernels {
  StepUnits step;
  StepBackwardUnits step_backward;
  DistanceUnits step_distance;
  SumsUnits backward_sums;
  NormalsUnits normals;
  ThresholdCount threshold_count;
  ThresholdSearch threshold_search;
  ThresholdApply threshold_apply;
};

namespace base {
extern const Kernels kKernels;
}
namespace v3 {
extern const Kernels kKernels;
}
namespace v4 {
extern const Kernels kKernels;
}

}  // namespace fastdiff
