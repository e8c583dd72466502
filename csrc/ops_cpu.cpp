// The CPU operators: the choice of instruction set, threads. Schemas stand in fastdiff/ops.py; this file only
// implements them, through LibTorch's stable ABI.
#include <atomic>

#include "checks.h"
#include "step_cpu.h"

namespace fastdiff {
namespace {

// The newest instruction set that was built and that this machine has; changed only by tests.
enum Isa : int { kBase, kV3, kV4 };

bool supported(int isa) {
#if defined(__x86_64__)
  __builtin_cpu_init();
#if defined(FASTDIFF_HAVE_V4)
  if (isa == kV4) {
    return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
           __builtin_cpu_supports("avx512cd") && __builtin_cpu_supports("avx512dq") &&
           __builtin_cpu_supports("avx512vl") && supported(kV3);
  }
#endif
#if defined(FASTDIFF_HAVE_V3)
  if (isa == kV3) {
    return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi") &&
           __builtin_cpu_supports("bmi2") && __builtin_cpu_supports("popcnt");
  }
#endif
#endif
  return isa == kBase;
}

int best_isa() { return supported(kV4) ? kV4 : supported(kV3) ? kV3 : kBase; }

std::atomic<int>& active_isa() {
  static std::atomic<int> isa{best_isa()};
  return isa;
}

const Kernels& kernels() {
  switch (active_isa().load(std::memory_order_relaxed)) {
#if defined(FASTDIFF_HAVE_V4)
    case kV4: return v4::kKernels;
#endif
#if defined(FASTDIFF_HAVE_V3)
    case kV3: return v3::kKernels;
#endif
    default: return base::kKernels;
  }
}

// select < 0 asks, another value switches where this machine can.
int64_t cpu_isa(int64_t select) {
  if (select >= 0) {
    STD_TORCH_CHECK(supported(int(select)), "fastdiff: instruction set ", select,
                    " was not built or is not supported here");
    active_isa().store(int(select));
  }
  return active_isa().load();
}

// Below this many elements a second thread costs more than it saves.
constexpr int64_t kParallelElements = 32768;

template <class Call>
void run_units(void (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  const int64_t units = units_of(call), elements = call.batch * call.sample;
  if (elements <= kParallelElements || torch::stable::get_num_threads() == 1) {
    kernel(call, 0, units);
    return;
  }
  const int64_t unit_elements = (elements + units - 1) / units;
  const int64_t grain = (kParallelElements / 2 + unit_elements - 1) / unit_elements;
  torch::stable::parallel_for(0, units, grain, [&](int64_t begin, int64_t end) { kernel(call, begin, end); });
}

void run_step(const StepArguments& arguments) {
  StepCall call;
  if (make_call(arguments, call, true)) run_units(kernels().step, call);
}

void run_backward(const BackwardArguments& arguments) {
  BackwardCall call;
  if (make_call(arguments, call, true)) run_units(kernels().step_backward, call);
}

void normals(Tensor out, Tensor seeds, int64_t t, int64_t repeat, int64_t domain) {
  NormalsCall call;
  if (make_call(out, seeds, t, repeat, domain, call)) run_units(kernels().normals, call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("step", TORCH_BOX(&step_operator<run_step>));
  m.impl("step_row", TORCH_BOX(&step_row_operator<run_step>));
  m.impl("step_backward", TORCH_BOX(&step_backward_operator<run_backward>));
  m.impl("normals", TORCH_BOX(&normals));
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace fastdiff
