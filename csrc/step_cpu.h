// What crosses from the checked call (ops_cpu.cpp) to the loops (step_cpu.cpp, compiled once per instruction set).
// No torch: plain pointers, sizes and strides.
#pragma once

#include "step.h"

namespace fastdiff {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

FASTDIFF_HD int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

constexpr int kMaxDims = 32;  // of a sample, after adjacent dimensions have been merged

// A tensor [B, ...] with strides in elements; data == nullptr where the call has no such operand.
struct Operand {
  char* data = nullptr;
  DType dtype = DType::kFloat32;
  int64_t batch_stride = 0;
  int64_t strides[kMaxDims];  // of the call's ndim
};

// How the elements of a sample lie in memory.
enum class Layout : int {
  kFlat,          // every operand contiguous in one common order, which is logical order wherever noise has seeds
  kChannelsLast,  // sample = [sizes[0], sizes[1]], dimension 0 with stride 1 in every operand
  kStrided,       // anything else, walked in logical order
};

struct StepCall {
  Operand out, second, x, model_output, learned, uncond, noise;
  const void* table = nullptr;  // [table_rows, kColumns], float32, or float64 for float64 state
  int64_t table_rows = 0;
  int64_t row = 0;             // used where t == nullptr
  const int64_t* t = nullptr;  // [B] (stride 0: one for all), looked up in t_to_row
  int64_t t_stride = 0;
  const int64_t* t_to_row = nullptr;  // [t_count], -1: not in the chain
  int64_t t_count = 0;
  const int64_t* seeds = nullptr;  // [B]
  int64_t seeds_stride = 0;
  const void* scale = nullptr;  // guidance scale [B], dtype of the table
  int64_t scale_stride = 0;
  int64_t batch = 0, sample = 0;  // samples, elements of one
  int64_t joined = 0;             // > 0: the batch was made one long sample, of which each seed has this many elements
  int ndim = 0;
  int64_t sizes[kMaxDims];
  Layout layout = Layout::kFlat;
  int flags = 0;
};

struct NormalsCall {
  Operand out;  // [B, sample], contiguous; cut into units as one row of elements
  const int64_t* seeds = nullptr;
  int64_t seeds_stride = 0;
  int64_t batch = 0, sample = 0;
  uint32_t t = 0, repeat = 0, domain = 0;
};

// Work is cut into units of one sample that do not depend on each other: runs of kUnit elements, or, in channels-last
// order, runs of whole columns.
constexpr int64_t kUnit = 4096;
constexpr int64_t kTile = 8192;        // elements of a channels-last tile
constexpr int64_t kTileRows = 64;      // at most; fewer, longer runs of noise are cheaper,
constexpr int64_t kTileColumns = 512;  // up to one full block of Philox counters

struct Tiling {
  int64_t rows, columns;
};

FASTDIFF_HD Tiling tiling(const StepCall& call) {
  const int64_t rows = call.sizes[0], columns = call.sizes[1];
  if (columns <= kTileColumns) {
    // Short rows: whole ones, whose noise is one run.
    const int64_t fit = kTile / columns;
    return {rows < fit ? rows : fit, columns};
  }
  const int64_t tile_rows = rows < kTileRows ? rows : kTileRows;
  const int64_t fit = kTile / tile_rows / 64 * 64;  // whole groups of Philox counters
  return {tile_rows, fit < kTileColumns ? fit : kTileColumns};
}

FASTDIFF_HD int64_t units_per_sample(const StepCall& call) {
  if (call.layout != Layout::kChannelsLast) return (call.sample + kUnit - 1) / kUnit;
  const int64_t columns = tiling(call).columns;
  return (call.sizes[1] + columns - 1) / columns;
}

FASTDIFF_HD int64_t units_of(const StepCall& call) { return call.batch * units_per_sample(call); }
FASTDIFF_HD int64_t units_of(const NormalsCall& call) { return (call.batch * call.sample + kUnit - 1) / kUnit; }

// The units [begin, end); those of a step are numbered sample * units_per_sample + unit of the sample.
using StepUnits = void (*)(const StepCall&, int64_t begin, int64_t end);
using NormalsUnits = void (*)(const NormalsCall&, int64_t begin, int64_t end);

struct Kernels {
  StepUnits step;
  NormalsUnits normals;
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
