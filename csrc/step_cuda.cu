// The CUDA operators: which kernel a call takes, and how many threads. Schemas stand in fastdiff/ops.py.
#include <algorithm>
#include <type_traits>
#include <utility>

#if defined(FASTDIFF_LAUNCH)
#include FASTDIFF_LAUNCH
#else
#include "launch.h"
#endif

#include "checks.h"
#include "step_cuda.h"
#include "threshold_cuda.h"

namespace fastdiff {
namespace cuda {
namespace {

struct Geometry {
  dim3 grid, block;
};

// Threads for `items` pieces of work in each of `batch` samples. A block spans several samples where they are short; a
// thread takes several pieces only where the GPU is full without, for its preparations are worth about one.
Geometry geometry(int64_t items, int64_t batch, int32_t device) {
  constexpr int64_t kMostPieces = 8, kMostBlocks = 65535;
  int64_t along = 1;
  while (along < items && along < kThreads) along *= 2;
  const int64_t across = kThreads / along;
  const auto blocks = [](int64_t work, int64_t each) { return (work + each - 1) / each; };
  const int64_t full = int64_t(multiprocessors(device)) * 2048;
  int64_t pieces = items * batch / full;
  pieces = pieces < 1 ? 1 : pieces < kMostPieces ? pieces : kMostPieces;
  const int64_t longest = blocks(items, along), of_sample = pieces < longest ? pieces : longest;
  const int64_t x = blocks(items, along * of_sample), y = blocks(batch, across * (pieces / of_sample));
  return {dim3(unsigned(x), unsigned(y < kMostBlocks ? y : kMostBlocks)), dim3(unsigned(along), unsigned(across))};
}

// A block for each leaf of each row.
dim3 leaf_grid(int64_t leaves, int64_t rows) { return dim3(unsigned(leaves), unsigned(rows < 65535 ? rows : 65535)); }

// Calls fn(State{}, Model{}) with the dtypes of a call; checks.h has let no other pair through.
template <class Fn>
void with_dtypes(DType state, DType model, Fn fn) {
  switch (state) {
    case DType::kFloat64: return fn(Float64{}, Float64{});
    case DType::kFloat16: return fn(Float16{}, Float16{});
    case DType::kBFloat16: return fn(BFloat16{}, BFloat16{});
    case DType::kFloat32:
      if (model == DType::kFloat16) return fn(Float32{}, Float16{});
      if (model == DType::kBFloat16) return fn(Float32{}, BFloat16{});
      return fn(Float32{}, Float32{});
  }
}

// The one dtype of the model outputs and their gradients, those that there are.
DType common_dtype(std::initializer_list<const Operand*> outputs, DType state) {
  const Operand* first = nullptr;
  for (const Operand* o : outputs) {
    if (o->data == nullptr) continue;
    first = first != nullptr ? first : o;
    STD_TORCH_CHECK(o->dtype == first->dtype, "fastdiff: uncond_output: expected model_output's dtype");
  }
  return first != nullptr ? first->dtype : state;
}

DType model_dtype(const StepCall& c) { return common_dtype({&c.model_output, &c.uncond}, c.x.dtype); }

// The narrowest kernel that does for a call.
Scope scope_of(const StepCall& c) {
  const bool other_noise = c.noise.data != nullptr && c.noise.dtype != c.x.dtype;
  const bool target = c.second.data != nullptr && second_of(c.flags) != Second::kX0;
  const bool other_terms = (c.flags & ((kTerms & ~kCommonTerms) | kHostRounding | kScalars)) != 0;
  if (other_terms || c.learned.data != nullptr || other_noise || target) return Scope::kAny;
  const bool few = c.model_output.data != nullptr && c.uncond.data == nullptr && c.second.data == nullptr;
  const bool plain = few && c.noise.data == nullptr && has_plain_terms(c.flags);
  return plain ? Scope::kPlain : Scope::kCommon;
}

// Whether 32 bits number the elements of a sample, with room for those a thread looks ahead.
bool is_narrow(const Call& c) { return c.sample < (int64_t(1) << 31); }

void launch_step(const Launcher& launch, int32_t device, const StepCall& c) {
  if (c.layout != Layout::kFlat) {
    const Geometry g = geometry((c.sample + 3) / 4, c.batch, device);
    const auto kernel = c.x.dtype == DType::kFloat64 ? step_strided<double, uint64_t>
                        : is_narrow(c)               ? step_strided<float, uint32_t>
                                                     : step_strided<float, uint64_t>;
    return launch(kernel, g.grid, g.block, c);
  }
  with_dtypes(c.x.dtype, model_dtype(c), [&](auto state, auto model) {
    using State = decltype(state);
    using Model = decltype(model);
    constexpr int N = kVector<State, Model>;
    const Geometry g = geometry((c.sample + N - 1) / N, c.batch, device);
    void (*kernel)(FlatStep) = step_flat<State, Model, Scope::kAny>;
    if constexpr (!std::is_same<State, Float64>::value) {
      const Scope scope = scope_of(c);
      if (scope == Scope::kCommon) kernel = step_flat<State, Model, Scope::kCommon>;
      if (scope == Scope::kPlain) kernel = step_flat<State, Model, Scope::kPlain>;
      if (scope == Scope::kPlain && c.seeds != nullptr) kernel = step_flat<State, Model, Scope::kPlain, true>;
    }
    launch(kernel, g.grid, g.block, FlatStep(c));
  });
}

void run_step(const StepArguments& arguments) {
  StepCall call;
  if (!make_call(arguments, call, false)) return;
  launch_step(Launcher(arguments.x), arguments.x.get_device_index(), call);
}

// Calls start(sums) to launch what leaves the sums of the leaves of each row, and folds these until one is left.
template <class T, class Start>
void launch_sums(const Launcher& launch, int64_t rows, int64_t sample, const Tensor* result, Start start) {
  if (result == nullptr) return start(nullptr);
  T* const last = static_cast<T*>(result->data_ptr());
  int64_t n = leaves_of(sample);
  if (n == 1) return start(last);
  const Tensor scratch = torch::stable::new_empty(*result, {rows * (n + leaves_of(n))});
  T *from = static_cast<T*>(scratch.data_ptr()), *to = from + rows * n;
  start(from);
  while (n > 1) {
    const int64_t leaves = leaves_of(n);
    launch.together(fold_sums<T>, leaf_grid(leaves, rows), dim3(kThreads), static_cast<const T*>(from), n, rows,
                    leaves == 1 ? last : to);
    std::swap(from, to);
    n = leaves;
  }
}

void run_distance(const DistanceArguments& arguments) {
  DistanceCall c;
  if (!make_call(arguments, c)) return;
  const Launcher launch(arguments.x);
  const auto start = [&](auto kernel, auto min_std) {
    using T = decltype(min_std);
    launch_sums<T>(launch, c.batch, c.sample, arguments.distance, [&](T* sums) {
      c.sums = sums;
      launch.together(kernel, leaf_grid(leaves_of(c.sample), c.batch), dim3(kThreads), c, min_std);
    });
  };
  if (c.x.dtype == DType::kFloat64) {
    start(step_distance<double, uint64_t>, c.min_std);
  } else {
    start(is_narrow(c) ? step_distance<float, uint32_t> : step_distance<float, uint64_t>, float(c.min_std));
  }
}

void launch_backward_sums(const Launcher& launch, SumsCall& c, const Tensor* result) {
  const auto start = [&](auto kernel, auto min_std) {
    using T = decltype(min_std);
    launch_sums<T>(launch, c.batch * kSums, c.sample, result, [&](T* sums) {
      c.sums = sums;
      launch.together(kernel, leaf_grid(leaves_of(c.sample), c.batch), dim3(kThreads), PackedSums(c), min_std);
    });
  };
  if (c.state == DType::kFloat64) {
    start(backward_sums<double, uint64_t>, c.min_std);
  } else {
    start(is_narrow(c) ? backward_sums<float, uint32_t> : backward_sums<float, uint64_t>, float(c.min_std));
  }
}

void run_backward(const BackwardArguments& arguments) {
  SumsCall c;
  if (!make_call(arguments, c, false)) return;
  const Tensor& like = like_of(arguments);
  const Launcher launch(like);
  if (arguments.sums != nullptr || has_distance(c)) return launch_backward_sums(launch, c, arguments.sums);
  const int32_t device = like.get_device_index();
  if (c.layout != Layout::kFlat) {
    const Geometry g = geometry((c.sample + 3) / 4, c.batch, device);
    const auto kernel = c.state == DType::kFloat64 ? backward_strided<double, uint64_t>
                        : is_narrow(c)             ? backward_strided<float, uint32_t>
                                                   : backward_strided<float, uint64_t>;
    return launch(kernel, g.grid, g.block, static_cast<const BackwardCall&>(c));
  }
  const DType model =
      common_dtype({&c.grad_model, &c.model_output, &c.grad_learned, &c.learned, &c.grad_uncond, &c.uncond}, c.state);
  with_dtypes(c.state, model, [&](auto state_format, auto model_format) {
    using State = decltype(state_format);
    using Model = decltype(model_format);
    constexpr int N = kVector<State, Model>;
    const Geometry g = geometry((c.sample + N - 1) / N, c.batch, device);
    launch(backward_flat<State, Model>, g.grid, g.block, FlatBackward(c));
  });
}

// The step with the noise of torch's stream. state: int64 [2], seed and offset in device memory, in place of seed.
void run_step_torch(Tensor out, std::optional<Tensor> second, Tensor x, std::optional<Tensor> model_output,
                    std::optional<Tensor> uncond, std::optional<Tensor> scale, Tensor table, std::optional<Tensor> t,
                    std::optional<Tensor> t_to_row, int64_t row, int64_t flags, std::optional<Tensor> state,
                    int64_t seed, int64_t offset, int64_t threads) {
  StepArguments arguments = {&out,
                             pointer(second),
                             x,
                             pointer(model_output),
                             pointer(uncond),
                             pointer(scale),
                             nullptr,
                             nullptr,
                             table,
                             pointer(t),
                             pointer(t_to_row),
                             row,
                             flags};
  arguments.draws = true;
  StepCall call;
  if (!make_call(arguments, call, false)) return;
  STD_TORCH_CHECK(variance_of(call.flags) != Variance::kNone, "fastdiff: flags: expected a table that adds noise");
  STD_TORCH_CHECK(call.layout == Layout::kFlat && (call.batch == 1 || call.sample % 4 == 0),
                  "fastdiff: x: expected contiguous tensors and samples of a multiple of 4 elements");
  STD_TORCH_CHECK(call.x.dtype != DType::kFloat64, "fastdiff: x: expected float32, float16 or bfloat16");
  STD_TORCH_CHECK(threads > 0 && threads % kThreads == 0, "fastdiff: threads: expected a multiple of ", kThreads);
  STD_TORCH_CHECK(offset % 4 == 0, "fastdiff: offset: expected a multiple of 4");
  const int64_t rounds = (call.batch * call.sample + 4 * threads - 1) / (4 * threads);
  TorchStream stream = {uint64_t(seed), uint64_t(offset), nullptr, threads, rounds};
  if (state.has_value()) {
    STD_TORCH_CHECK(checked_index("state", *state, Place(x), 2, false) == 1, "fastdiff: state: expected it contiguous");
    stream.state = static_cast<const int64_t*>(state->data_ptr());
  }
  const bool plain = call.batch == 1 && scope_of(call) == Scope::kPlain;
  with_dtypes(call.x.dtype, model_dtype(call), [&](auto state_format, auto model_format) {
    using State = decltype(state_format);
    using Model = decltype(model_format);
    if constexpr (!std::is_same<State, Float64>::value) {
      const Geometry g = geometry(threads / kTorchVector, rounds, x.get_device_index());
      const auto kernel = plain ? step_torch<State, Model, Scope::kPlain> : step_torch<State, Model, Scope::kAny>;
      const Launcher launch(x);
      launch(kernel, g.grid, g.block, FlatStep(call), stream);
    }
  });
}

void run_normals(Tensor out, Tensor seeds, int64_t t, int64_t repeat, int64_t domain) {
  NormalsCall call;
  if (!make_call(out, seeds, t, repeat, domain, call)) return;
  with_dtypes(call.out.dtype, call.out.dtype, [&](auto format, auto) {
    using Format = decltype(format);
    constexpr int N = kVector<Format, Format>;
    const Geometry g = geometry((call.sample + N - 1) / N, call.batch, out.get_device_index());
    const Launcher launch(out);
    launch(normals_flat<Format>, g.grid, g.block, call);
  });
}

template <class T>
void launch_threshold(const Launcher& launch, const Tensor& x0, const ThresholdCall& c) {
  constexpr int64_t kLeast = 8192;  // elements that are worth a block
  const SearchFor<T> search = {rank_of<T>(c.sample, c.ratio), T(c.max_value), last_level_of<T>(c.x.dtype)};
  const int64_t full = 2 * int64_t(multiprocessors(x0.get_device_index()));
  const int64_t blocks = std::min((c.sample + kLeast - 1) / kLeast, (full + c.batch - 1) / c.batch);
  const dim3 threads(kSearchThreads);
  if (blocks == 1) {
    const dim3 grid(1, unsigned(std::min(c.batch, int64_t(65535))));
    return launch.together(threshold_samples<T>, grid, threads, c, search);
  }
  const int64_t words = c.batch * int64_t(sizeof(SharedSearch<T>) / sizeof(Word));
  const Tensor scratch = torch::stable::new_zeros(x0, {words}, ScalarType::Long);
  auto* const searches = static_cast<SharedSearch<T>*>(scratch.data_ptr());
  const dim3 grid(unsigned(blocks), unsigned(c.batch));
  for (int level = 0; level <= search.last_level; ++level) {
    launch.together(threshold_level<T>, grid, threads, c, search, searches, level);
  }
  launch(threshold_apply<T>, grid, threads, c, static_cast<const SharedSearch<T>*>(searches));
}

void run_threshold(Tensor out, Tensor x0, double ratio, double max_value) {
  ThresholdCall call;
  if (!make_call(out, x0, ratio, max_value, call)) return;
  const Launcher launch(x0);
  if (call.x.dtype == DType::kFloat64) {
    launch_threshold<double>(launch, x0, call);
  } else {
    launch_threshold<float>(launch, x0, call);
  }
}

bool cuda_supports(int64_t device) { return runs_on(int32_t(device), normals_flat<Float32>); }

}  // namespace

#define FASTDIFF_IMPLEMENT(library, key, m) STABLE_TORCH_LIBRARY_IMPL(library, key, m)

FASTDIFF_IMPLEMENT(FASTDIFF_CUDA_NAMESPACE, FASTDIFF_CUDA_KEY, m) {
  m.impl("step", TORCH_BOX(&step_operator<run_step>));
  m.impl("step_row", TORCH_BOX(&step_row_operator<run_step>));
  m.impl("step_distance", TORCH_BOX(&step_distance_operator<run_distance>));
  m.impl("step_backward", TORCH_BOX(&step_backward_operator<run_backward>));
  m.impl("step_torch", TORCH_BOX(&run_step_torch));
  m.impl("normals", TORCH_BOX(&run_normals));
  m.impl("dynamic_threshold", TORCH_BOX(&run_threshold));
}

FASTDIFF_IMPLEMENT(FASTDIFF_CUDA_NAMESPACE, CompositeExplicitAutograd, m) {
  m.impl("cuda_supports", TORCH_BOX(&cuda_supports));
}

}  // namespace cuda
}  // namespace fastdiff
