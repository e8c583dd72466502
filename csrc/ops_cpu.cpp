// The CPU operators: the choice of instruction set, threads. Schemas stand in fastdiff/ops.py; this file only
// implements them, through LibTorch's stable ABI.
#include <atomic>
#include <vector>

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

// Sums of T for each of `rows` rows, from those of its leaves: the tree from there on, which overwrites the leaves.
template <class T>
void fold(T* leaves, int64_t rows, int64_t count, T* to) {
  for (int64_t r = 0; r < rows; ++r, leaves += count) {
    for (int64_t n = count; n > 1; n = (n + 1) / 2) {
      for (int64_t i = 0; i < n / 2; ++i) leaves[i] = leaves[2 * i] + leaves[2 * i + 1];
      if (n % 2 == 1) leaves[n / 2] = leaves[n - 1];
    }
    to[r] = leaves[0];
  }
}

// Runs a call that leaves sums of the leaves of each row; absent: those of a sample whose timestep is not in the chain.
template <class T, class AnyCall>
void run_sums_of(void (*kernel)(const AnyCall&, int64_t, int64_t), AnyCall& call, int64_t rows, T absent,
                 const Tensor& to) {
  const int64_t count = leaves_of(call.sample);
  std::vector<T> leaves(size_t(rows * count), absent);
  call.sums = leaves.data();
  run_units(kernel, call);
  fold(leaves.data(), rows, count, static_cast<T*>(to.data_ptr()));
}

template <class AnyCall>
void run_sums(void (*kernel)(const AnyCall&, int64_t, int64_t), AnyCall& call, int64_t rows, float absent,
              const Tensor* to) {
  if (to == nullptr) {
    run_units(kernel, call);
  } else if (to->scalar_type() == ScalarType::Double) {
    run_sums_of<double>(kernel, call, rows, absent, *to);
  } else {
    run_sums_of<float>(kernel, call, rows, absent, *to);
  }
}

void run_distance(const DistanceArguments& arguments) {
  DistanceCall call;
  if (!make_call(arguments, call)) return;
  run_sums(kernels().step_distance, call, call.batch, __builtin_nanf(""), arguments.distance);
}

void run_backward(const BackwardArguments& arguments) {
  SumsCall call;
  if (!make_call(arguments, call, true)) return;
  if (!has_distance(call) && arguments.sums == nullptr) {
    return run_units<BackwardCall>(kernels().step_backward, call);
  }
  run_sums(kernels().backward_sums, call, call.batch * kSums, 0, arguments.sums);
}

void normals(Tensor out, Tensor seeds, int64_t t, int64_t repeat, int64_t domain) {
  NormalsCall call;
  if (make_call(out, seeds, t, repeat, domain, call)) run_units(kernels().normals, call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("step", TORCH_BOX(&step_operator<run_step>));
  m.impl("step_row", TORCH_BOX(&step_row_operator<run_step>));
  m.impl("step_distance", TORCH_BOX(&step_distance_operator<run_distance>));
  m.impl("step_backward", TORCH_BOX(&step_backward_operator<run_backward>));
  m.impl("normals", TORCH_BOX(&normals));
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace fastdiff
