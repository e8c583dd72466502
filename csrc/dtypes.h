// The dtypes of states and model outputs: how each is stored, and how it becomes a number to compute with.
// Host and device, no torch.
#pragma once

#include "philox.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#elif defined(__F16C__)
#include <immintrin.h>
#endif

namespace fastdiff {

enum class DType : int { kFloat32, kFloat64, kFloat16, kBFloat16 };

FASTDIFF_HD int64_t element_size(DType dtype) {
  return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2;
}

struct Float32 {
  using Storage = float;
  static constexpr DType kDType = DType::kFloat32;
  static FASTDIFF_HD float load(float v) { return v; }
  static FASTDIFF_HD float store(float v) { return v; }
};

struct Float64 {
  using Storage = double;
  static constexpr DType kDType = DType::kFloat64;
  static FASTDIFF_HD double load(double v) { return v; }
  static FASTDIFF_HD double store(double v) { return v; }
};

struct Float16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::kFloat16;

  static FASTDIFF_HD float load(uint16_t h) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(h));
#elif defined(__F16C__)
    return _cvtsh_ss(h);
#else
    const uint32_t sign = uint32_t(h & 0x8000u) << 16;
    const uint32_t rest = h & 0x7FFFu;
    // Placing the bits as a float with a too small exponent and multiplying by 2^112 normalises subnormals as well.
    float magnitude = bit_cast<float>(rest << 13) * 0x1p112f;
    if (rest >= 0x7C00u) magnitude = bit_cast<float>(0x7F800000u | (rest << 13));
    return bit_cast<float>(bit_cast<uint32_t>(magnitude) | sign);
#endif
  }

  static FASTDIFF_HD uint16_t store(float v) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(v));
#elif defined(__F16C__)
    return _cvtss_sh(v, _MM_FROUND_TO_NEAREST_INT);
#else
    const uint32_t bits = bit_cast<uint32_t>(v);
    const uint32_t sign = (bits >> 16) & 0x8000u;
    const uint32_t magnitude = bits & 0x7FFFFFFFu;
    if (magnitude > 0x7F800000u) return uint16_t(sign | 0x7E00u);
    if (magnitude >= 0x477FF000u) return uint16_t(sign | 0x7C00u);  // rounds past 65504
    if (magnitude < 0x38800000u) {
      // Subnormal: adding 2^-1 aligns the last bit of half with the last bit of the sum, which rounds it.
      return uint16_t(sign | (bit_cast<uint32_t>(bit_cast<float>(magnitude) + 0.5f) - 0x3F000000u));
    }
    return uint16_t(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13));
#endif
  }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr DType kDType = DType::kBFloat16;

  static FASTDIFF_HD float load(uint16_t h) { return bit_cast<float>(uint32_t(h) << 16); }

  static FASTDIFF_HD uint16_t store(float v) {
#if defined(__CUDA_ARCH__)
    return __bfloat16_as_ushort(__float2bfloat16_rn(v));
#else
    const uint32_t bits = bit_cast<uint32_t>(v);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return uint16_t((bits & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded);
#endif
  }
};

// What a state is computed in.
template <class State>
struct ComputeOf {
  using Type = float;
};
template <>
struct ComputeOf<Float64> {
  using Type = double;
};
template <class State>
using Compute = typename ComputeOf<State>::Type;

}  // namespace fastdiff
