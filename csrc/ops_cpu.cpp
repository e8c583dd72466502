// The CPU operators: the choice of instruction set, threads. Schemas stand in fastdiff/ops.py; this file only
// implements them, through LibTorch's stable ABI.
#include <algorithm>
#include <atomic>
#include <cstdio>
#include <mutex>
#include <numeric>
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

// Bytes of the last-level cache that a processor sees, as Linux tells them; else a guess. sysconf may add up those of a
// whole socket.
int64_t cache_bytes() {
  long kilobytes = 0;
  if (FILE* const file = std::fopen("/sys/devices/system/cpu/cpu0/cache/index3/size", "r")) {
    if (std::fscanf(file, "%ldK", &kilobytes) != 1) kilobytes = 0;
    std::fclose(file);
  }
  return int64_t(kilobytes > 0 ? kilobytes : 32768) << 10;
}

void run_step(const StepArguments& arguments) {
  static const int64_t cache = cache_bytes();
  StepCall call;
  if (!make_call(arguments, call, true)) return;
  // of a result larger than the cache nothing would be left there for whoever reads it from the beginning
  const bool apart = call.out.data != call.x.data && call.out.data != call.model_output.data;
  if (apart && call.batch * call.sample * int64_t(sizeof(float)) > cache) call.flags |= kPastCache;
  run_units(kernels().step, call);
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

void normals(const Tensor& out, const Tensor& seeds, int64_t t, int64_t repeat, int64_t domain) {
  NormalsCall call;
  if (make_call(out, seeds, t, repeat, domain, call)) run_units(kernels().normals, call);
}

// Calls fn(first, last) for ranges of the elements of a sample, by several threads if they are to share it.
template <class Fn>
void over_sample(int64_t elements, bool shared, Fn fn) {
  constexpr int64_t kMost = int64_t(1) << 20;  // of a range: 32 bits count it
  const auto run = [&](int64_t begin, int64_t end) {
    for (int64_t first = begin; first < end; first += kMost) fn(first, first + kMost < end ? first + kMost : end);
  };
  if (shared) {
    torch::stable::parallel_for(0, elements, kParallelElements / 2, run);
  } else {
    run(0, elements);
  }
}

// Where the element of a rank lies in a level of the search: its bin, and its rank among those of the bin.
struct Found {
  uint64_t bin;
  int64_t rank;
};

Found find_rank(const std::vector<int64_t>& counts, int64_t rank) {
  uint64_t bin = 0;
  for (; rank >= counts[bin]; ++bin) rank -= counts[bin];
  return {bin, rank};
}

// The quantile of |x| over a sample that has no NaN.
template <class T>
T quantile(const ThresholdCall& call, const Rank<T>& rank, int64_t b, bool shared) {
  uint64_t prefix = 0;
  Found found = {0, rank.below};
  std::vector<int64_t> counts(kMostBins);
  const int last_level = last_level_of<T>(call.x.dtype);
  for (int level = 0;; ++level) {
    std::mutex mutex;
    std::fill(counts.begin(), counts.end(), 0);
    uint64_t next = kNanKey<T>;
    over_sample(call.sample, shared, [&](int64_t first, int64_t last) {
      ThresholdLevel part = {level, prefix, {}, kNanKey<T>};
      kernels().threshold_search(call, b, first, last, part);
      const std::lock_guard<std::mutex> lock(mutex);
      for (int bin = 0; bin < kMostBins; ++bin) counts[size_t(bin)] += part.counts[bin];
      next = std::min(next, part.next);
    });
    const int64_t of_next = found.rank + 1;
    found = find_rank(counts, found.rank);
    const int shift = shift_of<T>(level), bits = shift_before<T>(level) - shift;
    if (level < last_level) {
      prefix = prefix << bits | found.bin;
      continue;
    }
    const auto with_bin = [&](uint64_t bin) { return (prefix << bits | bin) << shift; };
    const T low = value_of<T>(Key<T>(with_bin(found.bin)));
    if (rank.weight == T(0)) return interpolate(low, low, rank.weight);
    // of the same prefix, or of a greater one
    const int64_t matching = std::accumulate(counts.begin(), counts.end(), int64_t(0));
    if (of_next < matching) next = with_bin(find_rank(counts, of_next).bin);
    return interpolate(low, value_of<T>(Key<T>(next)), rank.weight);
  }
}

template <class T>
T find_bound(const ThresholdCall& call, const Rank<T>& rank, int64_t b, bool shared) {
  ThresholdCounts counts;
  std::mutex mutex;
  over_sample(call.sample, shared, [&](int64_t first, int64_t last) {
    ThresholdCounts part;
    kernels().threshold_count(call, b, first, last, part);
    const std::lock_guard<std::mutex> lock(mutex);
    counts.at_most_one += part.at_most_one;
    counts.under_max += part.under_max;
    counts.highest = std::max(counts.highest, part.highest);
  });
  if (counts.highest > KeyOf<T>::kInf) return value_of<T>(kNanKey<T>);
  const int64_t finite = counts.highest < KeyOf<T>::kInf ? call.sample : 0;
  const T max_value = T(call.max_value);
  T bound;
  if (settle(rank, finite, counts.at_most_one, counts.under_max, max_value, bound)) return bound;
  return bound_of(quantile(call, rank, b, shared), max_value);
}

template <class T>
void threshold_samples(const ThresholdCall& call) {
  const Rank<T> rank = rank_of<T>(call.sample, call.ratio);
  const auto samples = [&](int64_t begin, int64_t end, bool shared) {
    for (int64_t b = begin; b < end; ++b) {
      const double bound = find_bound(call, rank, b, shared);
      over_sample(call.sample, shared,
                  [&](int64_t first, int64_t last) { kernels().threshold_apply(call, b, first, last, bound); });
    }
  };
  const int64_t threads = int64_t(torch::stable::get_num_threads());
  if (threads == 1 || call.batch * call.sample <= kParallelElements) {
    samples(0, call.batch, false);
  } else if (call.batch < threads && call.sample > kParallelElements) {
    samples(0, call.batch, true);
  } else {
    const int64_t grain = (kParallelElements / 2 + call.sample - 1) / call.sample;
    torch::stable::parallel_for(0, call.batch, grain, [&](int64_t begin, int64_t end) { samples(begin, end, false); });
  }
}

void dynamic_threshold(const Tensor& out, const Tensor& x0, double ratio, double max_value) {
  ThresholdCall call;
  if (!make_call(out, x0, ratio, max_value, call)) return;
  if (call.x.dtype == DType::kFloat64) {
    threshold_samples<double>(call);
  } else {
    threshold_samples<float>(call);
  }
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("step", TORCH_BOX(&step_operator<run_step>));
  m.impl("step_row", TORCH_BOX(&step_row_operator<run_step>));
  m.impl("step_distance", TORCH_BOX(&step_distance_operator<run_distance>));
  m.impl("step_backward", TORCH_BOX(&step_backward_operator<run_backward>));
  m.impl("normals", TORCH_BOX(&normals));
  m.impl("dynamic_threshold", TORCH_BOX(&dynamic_threshold));
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace fastdiff
