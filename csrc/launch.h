// How kernels are launched: on the device and the current stream of the call's tensors, and never unnoticed when they
// are not. tests/host_launch.h stands in for this file where the kernels run on a CPU.
#pragma once

#include <cuda_runtime.h>

#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>
#include <atomic>

// They live in a part of torch that its CPU builds lack; the library loads there as well.
#pragma weak aoti_torch_get_current_cuda_stream

#define FASTDIFF_CUDA_NAMESPACE fastdiff
#define FASTDIFF_CUDA_KEY CUDA

namespace fastdiff {
namespace cuda {

inline bool is_of_other_gpus(cudaError_t error) {
  return error == cudaErrorNoKernelImageForDevice || error == cudaErrorInvalidDeviceFunction;
}

class Launcher {
 public:
  explicit Launcher(const torch::stable::Tensor& like) : guard_(like.get_device_index()) {
    STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream != nullptr, "fastdiff: this torch is built without CUDA");
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(like.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }

  template <class... Arguments>
  void operator()(void (*kernel)(Arguments...), dim3 grid, dim3 block, Arguments... arguments) const {
    void* pointers[] = {&arguments...};
    // what it returns is about this launch; cudaGetLastError would also report what others left behind
    const cudaError_t error =
        cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, pointers, 0, stream_);
    if (error == cudaSuccess) return;
    cudaGetLastError();
    STD_TORCH_CHECK(false, "fastdiff: a kernel could not be launched: ", cudaGetErrorString(error),
                    is_of_other_gpus(error)
                        ? ". The library was built for other GPUs: install it again with TORCH_CUDA_ARCH_LIST set to "
                          "the compute capability of this one, or use backend='triton'"
                        : "");
  }

  // For a kernel whose threads wait for one another: to a GPU all the same, not to what stands in for one in the tests.
  template <class... Arguments>
  void together(void (*kernel)(Arguments...), dim3 grid, dim3 block, Arguments... arguments) const {
    (*this)(kernel, grid, block, arguments...);
  }

 private:
  const torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

// Whether the library holds code for a device.
template <class... Arguments>
bool runs_on(int32_t device, void (*kernel)(Arguments...)) {
  const torch::stable::accelerator::DeviceGuard guard(device);
  cudaFuncAttributes attributes;
  const cudaError_t error = cudaFuncGetAttributes(&attributes, reinterpret_cast<const void*>(kernel));
  if (error == cudaSuccess) return true;
  cudaGetLastError();
  STD_TORCH_CHECK(is_of_other_gpus(error), "fastdiff: ", cudaGetErrorString(error),
                  error == cudaErrorInsufficientDriver ? ": update it, or use backend='triton'" : "");
  return false;
}

inline int multiprocessors(int32_t device) {
  static std::atomic<int> known[64];
  const bool kept = device >= 0 && device < 64;
  int count = kept ? known[device].load(std::memory_order_relaxed) : 0;
  if (count == 0) {
    const cudaError_t error = cudaDeviceGetAttribute(&count, cudaDevAttrMultiProcessorCount, device);
    STD_TORCH_CHECK(error == cudaSuccess, "fastdiff: ", cudaGetErrorString(error));
    if (kept) known[device].store(count, std::memory_order_relaxed);
  }
  return count;
}

}  // namespace cuda
}  // namespace fastdiff
