// Stands in for csrc/launch.h where csrc/step_cuda.cu is compiled as plain C++: the kernels run on a CPU, thread after
// thread, over CPU tensors, as operators of the library fastdiff_host. tests/host_kernels.py builds it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <cmath>
#include <cstdint>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__

#define FASTDIFF_CUDA_NAMESPACE fastdiff_host
#define FASTDIFF_CUDA_KEY CPU

struct dim3 {
  unsigned x, y, z;
  constexpr dim3(unsigned x = 1, unsigned y = 1, unsigned z = 1) : x(x), y(y), z(z) {}
};

inline dim3 gridDim, blockDim, blockIdx, threadIdx;

// The fast sine and cosine of a GPU, which are less accurate.
inline void __sincosf(float angle, float* sine, float* cosine) {
  *sine = std::sin(angle);
  *cosine = std::cos(angle);
}

namespace fastdiff {
namespace cuda {

// The GPU that is played, and which of a launch's blocks run: all, or those of a range.
struct Machine {
  int64_t multiprocessors = 132, first_block = 0, last_block = INT64_MAX;
  int64_t launches = 0, blocks = 0;
};
inline Machine machine;

class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor&) {}

  template <class... Arguments>
  void operator()(void (*kernel)(Arguments...), dim3 grid, dim3 block, Arguments... arguments) const {
    STD_TORCH_CHECK(grid.x > 0 && grid.y > 0 && grid.y <= 65535 && block.x * block.y <= 1024, "invalid launch");
    gridDim = grid;
    blockDim = block;
    machine.launches += 1;
    machine.blocks = int64_t(grid.x) * grid.y;
    // backwards: what depends on the order of blocks shows
    for (int64_t id = std::min(machine.last_block, machine.blocks); id-- > machine.first_block;) {
      blockIdx = dim3(unsigned(id % grid.x), unsigned(id / grid.x));
      for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y) {
        for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(arguments...);
      }
    }
  }
};

template <class... Arguments>
bool runs_on(int32_t, void (*)(Arguments...)) {
  return true;
}

inline int multiprocessors(int32_t) { return int(machine.multiprocessors); }

inline int64_t play(int64_t multiprocessors, int64_t first_block, int64_t last_block) {
  machine.multiprocessors = multiprocessors;
  machine.first_block = first_block;
  machine.last_block = last_block;
  return machine.blocks;
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff_host, CompositeExplicitAutograd, m) { m.impl("play", TORCH_BOX(&play)); }

}  // namespace cuda
}  // namespace fastdiff
