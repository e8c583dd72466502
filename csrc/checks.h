// What every entry of the library checks before it touches memory. Python raises TypeError and ValueError with the
// user's words (fastdiff/ops.py); these checks guard direct callers of the operators and arrive as RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>

#include "step_cpu.h"

namespace fastdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

inline DType checked_dtype(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return DType::kFloat32;
    case ScalarType::Double: return DType::kFloat64;
    case ScalarType::Half: return DType::kFloat16;
    case ScalarType::BFloat16: return DType::kBFloat16;
    default: STD_TORCH_CHECK(false, "fastdiff: ", name, ": expected float32, float64, float16 or bfloat16");
  }
}

inline bool is_half(DType dtype) { return dtype == DType::kFloat16 || dtype == DType::kBFloat16; }

// int64 [B], or, where it may be shared, one element for all samples. Returns its stride.
inline int64_t checked_index(const char* name, const Tensor& tensor, int64_t batch, bool shared) {
  STD_TORCH_CHECK(tensor.is_cpu() && tensor.scalar_type() == ScalarType::Long, "fastdiff: ", name,
                  ": expected an int64 tensor on the CPU");
  if (shared && tensor.numel() == 1) return 0;
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == 1 && sizes[0] == batch, "fastdiff: ", name, ": expected shape [", batch, "]");
  return tensor.strides()[0];
}

// The rows, contiguous [S, kColumns]; float64 exactly for a float64 state. Returns S.
inline int64_t checked_table(const Tensor& table, DType state) {
  const ScalarType expected = state == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const auto sizes = table.sizes();
  STD_TORCH_CHECK(table.is_cpu() && table.scalar_type() == expected && sizes.size() == 2 && sizes[1] == kColumns &&
                      table.is_contiguous(),
                  "fastdiff: table: expected a contiguous [S, ", int(kColumns),
                  "] tensor on the CPU, float64 for a float64 state, else float32");
  return sizes[0];
}

}  // namespace fastdiff
