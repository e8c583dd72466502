// What crosses from the checked call (checks.h) to the loops (step_cpu.cpp) and kernels (step_cuda.h). No torch: plain
// pointers, sizes and strides.
#pragma once

#include "dtypes.h"
#include "step.h"

namespace fastdiff {

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

// What every call has beside its operands.
struct Call {
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
  int flags = 0;
};

// How the operands of a call lie in memory.
struct Shape {
  int64_t joined = 0;  // > 0: the batch was made one long sample, of which each seed has this many elements
  int ndim = 0;
  int64_t sizes[kMaxDims];
  Layout layout = Layout::kFlat;
};

struct StepCall : Call, Shape {
  Operand out, second, x, model_output, learned, uncond, noise;
};

// The sums of a sample are made of those of its leaves, runs of kLeaf elements.
FASTDIFF_HD int64_t leaves_of(int64_t elements) { return (elements + kLeaf - 1) / kLeaf; }

// The squares of the deviations of x' from its mean: of the x' that the step makes (out), or of one that is given.
struct DistanceCall : StepCall {
  Operand squares, x_prev;
  double min_std = 0;
  void* sums = nullptr;  // [B, leaves], in what is computed in; null where no sum is wanted
};

// The backward of a step: the gradients that are wanted, from those of the outputs that are given. The inputs of the
// step are here where the gradients depend on them (masks_clip, reads_noise), and only then.
struct BackwardCall : Call, Shape {
  Operand grad_x, grad_model, grad_learned, grad_uncond, grad_noise;
  Operand grad, grad_second, x, model_output, learned, uncond, noise;
  DType state = DType::kFloat32;  // of grad, grad_second and x
};

// A backward that is also given the gradient of the distance of x_prev from the mean, or gives the sums of the
// gradients of its rows.
struct SumsCall : BackwardCall {
  Operand x_prev, grad_squares;
  const void* grad_distance = nullptr;  // [B], in place of grad_squares, the gradient of each element's part
  int64_t grad_distance_stride = 0;
  double min_std = 0;
  void* sums = nullptr;  // [B, kSums, leaves], in what is computed in; null where they are not wanted
};

FASTDIFF_HD bool has_distance(const SumsCall& call) {
  return call.grad_distance != nullptr || call.grad_squares.data != nullptr;
}

FASTDIFF_HD bool reads_noise(const BackwardCall& call) { return call.noise.data != nullptr || call.seeds != nullptr; }

// The row of sample b; -1 where its timestep is not in the chain.
FASTDIFF_HD int64_t find_row(const Call& call, int64_t b) {
  int64_t row = call.row;
  if (call.t != nullptr) {
    const int64_t t = call.t[b * call.t_stride];
    row = t >= 0 && t < call.t_count ? call.t_to_row[t] : -1;
  }
  return row >= 0 && row < call.table_rows ? row : -1;
}

// What the noise of a sample is made from, beside the index of the element.
struct Stream {
  uint64_t seed;
  uint32_t t, domain, repeat;
};

// Calls fn with the rounding of a call: only half states under a host's rule round in between. T: what is computed in.
template <class T, class Fn>
FASTDIFF_HD void with_rounding(DType state, int flags, Fn fn) {
  // double has no host rounding: the functor would narrow it
  if constexpr (sizeof(T) == sizeof(float)) {
    if ((flags & kHostRounding) && state == DType::kFloat16) return fn(RoundTo<Float16>{});
    if ((flags & kHostRounding) && state == DType::kBFloat16) return fn(RoundTo<BFloat16>{});
  }
  fn(KeepPrecision{});
}

struct NormalsCall {
  Operand out;  // [B, sample], contiguous
  const int64_t* seeds = nullptr;
  int64_t seeds_stride = 0;
  int64_t batch = 0, sample = 0;
  uint32_t t = 0, repeat = 0, domain = 0;
};

}  // namespace fastdiff
