// Stands in for csrc/launch.h where csrc/step_cuda.cu is compiled as plain C++: the kernels run on a CPU, thread after
// thread, over CPU tensors, as operators of the library fastdiff_host. tests/host_kernels.py builds it.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <setjmp.h>
#include <ucontext.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <functional>

#define __global__
#define __device__
#define __forceinline__ inline
#define __launch_bounds__(...)
#define __grid_constant__
#define __shared__ static

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

// The threads of a block that wait for one another, each on a stack of its own. A thread runs until it waits: for its
// warp in a shuffle, for the block at a barrier. A warp goes on as far as it can before the next one runs, and which
// one is first changes from barrier to barrier, so that a missing barrier shows.
class Turns {
 public:
  static constexpr unsigned kWarp = 32, kMost = 1024;

  void run(unsigned threads, int64_t block, const std::function<void()>& body) {
    STD_TORCH_CHECK(threads <= kMost && threads % kWarp == 0, "invalid launch");
    body_ = &body;
    for (unsigned k = unsigned(threads_.size()); k < threads; ++k) begin(k);
    for (unsigned k = 0; k < threads; ++k) threads_[k].state = kReady;
    const unsigned warps = threads / kWarp;
    for (int64_t phase = block; !all_in(kDone, 0, threads); ++phase) {
      for (unsigned w = 0; w < warps; ++w) run_warp((phase % 2 == 0 ? w : warps - 1 - w) * kWarp);
      STD_TORCH_CHECK(all_in(kAtBarrier, 0, threads) || all_in(kDone, 0, threads), "the threads of a block went apart");
    }
  }

  void barrier() { wait(kAtBarrier); }

  template <class T>
  T exchange(T value, unsigned lane_mask) {
    Thread& mine = threads_[current_];
    const int turn = mine.exchanges++ % 2;  // the last values may still be read
    memcpy(mine.slots[turn], &value, sizeof(T));
    wait(kInShuffle);
    memcpy(&value, threads_[current_ ^ lane_mask].slots[turn], sizeof(T));
    return value;
  }

 private:
  enum State { kReady, kInShuffle, kAtBarrier, kDone };
  static constexpr size_t kStack = 1 << 16;

  struct Thread {
    State state = kReady;
    int64_t exchanges = 0;
    char slots[2][sizeof(double)];
    ucontext_t start;
    jmp_buf rest;
    char stack[kStack];
  };

  bool all_in(State state, unsigned first, unsigned last) const {
    return std::all_of(threads_.begin() + first, threads_.begin() + last,
                       [&](const Thread& thread) { return thread.state == state; });
  }

  void run_warp(unsigned first) {
    do {
      for (unsigned k = first; k < first + kWarp; ++k) resume(k);
    } while (all_in(kInShuffle, first, first + kWarp));
  }

  // A thread is begun once, for all blocks to come: contexts are switched by calls of the system.
  void begin(unsigned k) {
    Thread& thread = threads_.emplace_back();
    current_ = k;
    getcontext(&thread.start);
    thread.start.uc_stack.ss_sp = thread.stack;
    thread.start.uc_stack.ss_size = kStack;
    thread.start.uc_link = nullptr;
    makecontext(&thread.start, &Turns::live, 0);
    if (_setjmp(home_) == 0) setcontext(&thread.start);
  }

  void resume(unsigned k) {
    if (threads_[k].state == kDone) return;
    current_ = k;
    threadIdx = dim3(k % blockDim.x, k / blockDim.x);
    if (_setjmp(home_) == 0) _longjmp(threads_[k].rest, 1);
  }

  void wait(State state) {
    Thread& thread = threads_[current_];
    thread.state = state;
    if (_setjmp(thread.rest) == 0) _longjmp(home_, 1);
  }

  static void live();

  const std::function<void()>* body_ = nullptr;
  std::deque<Thread> threads_;  // where one is, it stays
  unsigned current_ = 0;
  jmp_buf home_;
};
inline Turns turns;

inline void Turns::live() {
  for (;;) {
    turns.wait(kDone);
    (*turns.body_)();
  }
}

inline void __syncthreads() { turns.barrier(); }

template <class T>
T __shfl_xor_sync(unsigned, T value, unsigned lane_mask) {
  return turns.exchange(value, lane_mask);
}

// One thread runs at a time.
template <class T>
T atomicAdd(T* to, T value) {
  const T before = *to;
  *to += value;
  return before;
}

template <class T>
T atomicMax(T* to, T value) {
  const T before = *to;
  *to = std::max(before, value);
  return before;
}

inline void __threadfence() {}

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
    run_blocks(grid, block, [&](int64_t) {
      for (threadIdx.y = 0; threadIdx.y < block.y; ++threadIdx.y) {
        for (threadIdx.x = 0; threadIdx.x < block.x; ++threadIdx.x) kernel(arguments...);
      }
    });
  }

  template <class... Arguments>
  void together(void (*kernel)(Arguments...), dim3 grid, dim3 block, Arguments... arguments) const {
    run_blocks(grid, block, [&](int64_t id) { turns.run(block.x * block.y, id, [&] { kernel(arguments...); }); });
  }

 private:
  template <class Block>
  static void run_blocks(dim3 grid, dim3 block, Block run) {
    STD_TORCH_CHECK(grid.x > 0 && grid.y > 0 && grid.y <= 65535 && block.x * block.y <= 1024, "invalid launch");
    gridDim = grid;
    blockDim = block;
    machine.launches += 1;
    machine.blocks = int64_t(grid.x) * grid.y;
    // backwards: what depends on the order of blocks shows
    for (int64_t id = std::min(machine.last_block, machine.blocks); id-- > machine.first_block;) {
      blockIdx = dim3(unsigned(id % grid.x), unsigned(id / grid.x));
      run(id);
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
