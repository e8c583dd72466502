// The CPU operators: checks, the layout of a call, the choice of instruction set, threads. Schemas stand in
// fastdiff/ops.py; this file only implements them, through LibTorch's stable ABI.
#include <atomic>
#include <initializer_list>
#include <utility>

#include "checks.h"

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

// A call under construction: the operands with all their dimensions, merged and ordered by finish().
class CallBuilder {
 public:
  CallBuilder(const Tensor& x, const Tensor& out) {
    const auto sizes = x.sizes();
    STD_TORCH_CHECK(sizes.size() >= 1, "fastdiff: x: expected a batch dimension");
    STD_TORCH_CHECK(sizes.size() <= kMaxRank + 1, "fastdiff: x: expected at most ", kMaxRank + 1, " dimensions");
    rank_ = int(sizes.size()) - 1;
    call.batch = sizes[0];
    call.sample = 1;
    for (int d = 0; d < rank_; ++d) {
      sizes_[d] = sizes[d + 1];
      call.sample *= sizes_[d];
    }
    add("x", call.x, x);
    add("out", call.out, out);
    STD_TORCH_CHECK(call.out.dtype == call.x.dtype, "fastdiff: out: expected x's dtype");
  }

  void add(const char* name, Operand& operand, const Tensor& tensor, int64_t channels = -1, int64_t first_channel = 0) {
    STD_TORCH_CHECK(tensor.is_cpu(), "fastdiff: ", name, ": expected a CPU tensor");
    operand.dtype = checked_dtype(name, tensor);
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    STD_TORCH_CHECK(int(sizes.size()) == rank_ + 1, "fastdiff: ", name, ": expected ", rank_ + 1, " dimensions, got ",
                    sizes.size());
    for (int d = 0; d <= rank_; ++d) {
      const int64_t expected = d == 1 && channels >= 0 ? channels : d == 0 ? call.batch : sizes_[d - 1];
      STD_TORCH_CHECK(sizes[d] == expected, "fastdiff: ", name, ": expected size ", expected, " in dimension ", d,
                      ", got ", sizes[d]);
    }
    operand.data = static_cast<char*>(tensor.data_ptr());
    STD_TORCH_CHECK(operand.data != nullptr || tensor.numel() == 0, "fastdiff: ", name,
                    ": expected a tensor with memory");
    operand.batch_stride = strides[0];
    for (int d = 0; d < rank_; ++d) strides_[count_][d] = strides[d + 1];
    if (first_channel > 0) operand.data += first_channel * strides_[count_][0] * element_size(operand.dtype);
    operands_[count_++] = &operand;
  }

  // out is memory of its own or exactly that of an input, each element of which is read before it is written; the
  // second output, which may be written before, is always memory of its own.
  void check_output(const char* name, const Operand& output) const {
    int index = 0;
    while (operands_[index] != &output) ++index;
    const Extents extents(*this, index);
    STD_TORCH_CHECK(!extents.overlap(), "fastdiff: ", name, ": expected distinct elements");
    for (int k = 0; k < count_; ++k) {
      const Operand& other = *operands_[k];
      if (k == index || other.data >= output.data + reach(index) || output.data >= other.data + reach(k)) continue;
      bool apart = false;
      if (other.dtype == output.dtype && same_strides(k, index)) {
        const int64_t bytes = other.data - output.data, size = element_size(output.dtype);
        if (bytes == 0 && &output == &call.out && &other != &call.second) continue;
        apart = bytes % size == 0 && !extents.contain(bytes / size);
      }
      STD_TORCH_CHECK(apart, "fastdiff: ", name, ": expected memory of its own, or for out exactly that of an input");
    }
  }

  // The seeds and timesteps are read while outputs are written.
  void check_index_apart(const char* name, const Tensor& index, const Operand& output) const {
    int k = 0;
    while (operands_[k] != &output) ++k;
    const char* const first = static_cast<const char*>(index.data_ptr());
    const int64_t last = index.numel() <= 1 ? index.numel() : (index.numel() - 1) * index.strides()[0] + 1;
    STD_TORCH_CHECK(first >= output.data + reach(k) || output.data >= first + last * int64_t(sizeof(int64_t)),
                    "fastdiff: ", name, ": expected memory apart from that of out");
  }

  // Merges what can be merged and picks the layout. Where no noise is made from seeds, logical order means nothing and
  // the dimensions are first put in memory order.
  void finish() {
    drop_ones();
    merge();
    if (call.seeds == nullptr && !flat()) {
      sort_by_out();
      merge();
    }
    if (flat()) {
      call.layout = Layout::kFlat;
    } else if (rank_ == 2 && channels_last()) {
      call.layout = Layout::kChannelsLast;
    } else {
      call.layout = Layout::kStrided;
    }
    if (call.layout == Layout::kFlat) join_samples();
    call.ndim = rank_;
    for (int d = 0; d < rank_; ++d) call.sizes[d] = sizes_[d];
    for (int k = 0; k < count_; ++k) {
      for (int d = 0; d < rank_; ++d) operands_[k]->strides[d] = strides_[k][d];
    }
  }

  StepCall call;

 private:
  static constexpr int kMaxRank = kMaxDims;
  static constexpr int kMaxOperands = 7;

  // Bytes from the first element of an operand to the end of its last.
  int64_t reach(int k) const {
    int64_t last = (call.batch - 1) * operands_[k]->batch_stride;
    for (int d = 0; d < rank_; ++d) last += (sizes_[d] - 1) * strides_[k][d];
    return (last + 1) * element_size(operands_[k]->dtype);
  }

  bool same_strides(int k, int other) const {
    bool same = call.batch == 1 || operands_[k]->batch_stride == operands_[other]->batch_stride;
    for (int d = 0; d < rank_; ++d) same = same && (sizes_[d] == 1 || strides_[k][d] == strides_[other][d]);
    return same;
  }

  // The dimensions of an operand, the batch included, in ascending order of stride.
  struct Extents {
    int64_t strides[kMaxDims + 1], sizes[kMaxDims + 1];
    int n = 0;

    Extents(const CallBuilder& builder, int k) {
      for (int d = -1; d < builder.rank_; ++d) {
        const int64_t size = d < 0 ? builder.call.batch : builder.sizes_[d];
        const int64_t stride = d < 0 ? builder.operands_[k]->batch_stride : builder.strides_[k][d];
        if (size == 1) continue;
        int at = n++;
        for (; at > 0 && strides[at - 1] > stride; --at) {
          strides[at] = strides[at - 1];
          sizes[at] = sizes[at - 1];
        }
        strides[at] = stride;
        sizes[at] = size;
      }
    }

    // Whether two elements may share memory: a dimension steps less than those inside it reach.
    bool overlap() const {
      int64_t inside = 1;
      for (int i = 0; i < n; ++i) {
        if (strides[i] < inside) return true;
        inside += (sizes[i] - 1) * strides[i];
      }
      return false;
    }

    // Whether some two elements, not overlapping as above, are `delta` apart: then the same tensor moved by delta
    // meets itself. As dimensions nest, there are two candidates for the step along each.
    bool contain(int64_t delta) const { return contain(delta, n); }

    bool contain(int64_t delta, int dims) const {
      if (dims == 0) return delta == 0;
      const int64_t stride = strides[dims - 1], size = sizes[dims - 1];
      const int64_t below = delta / stride - (delta % stride < 0);
      for (int64_t k = below; k <= below + 1; ++k) {
        if (k > -size && k < size && contain(delta - k * stride, dims - 1)) return true;
      }
      return false;
    }
  };

  // Samples that follow one another and share their row are one long sample: short ones would cost a call each.
  void join_samples() {
    bool shared = call.batch > 1 && call.t == nullptr && call.scale_stride == 0;
    for (int k = 0; k < count_; ++k) shared = shared && operands_[k]->batch_stride == call.sample;
    if (!shared) return;
    if (call.seeds != nullptr) call.joined = call.sample;
    call.sample *= call.batch;
    call.batch = 1;
  }

  void remove(int d) {
    for (int i = d; i + 1 < rank_; ++i) {
      sizes_[i] = sizes_[i + 1];
      for (int k = 0; k < count_; ++k) strides_[k][i] = strides_[k][i + 1];
    }
    --rank_;
  }

  void drop_ones() {
    for (int d = rank_ - 1; d >= 0; --d) {
      if (sizes_[d] == 1) remove(d);
    }
  }

  void merge() {
    for (int d = rank_ - 2; d >= 0; --d) {
      bool nested = true;
      for (int k = 0; k < count_; ++k) nested = nested && strides_[k][d] == strides_[k][d + 1] * sizes_[d + 1];
      if (!nested) continue;
      sizes_[d + 1] *= sizes_[d];
      remove(d);
    }
  }

  void sort_by_out() {
    constexpr int kOut = 1;  // added second
    for (int i = 1; i < rank_; ++i) {
      for (int d = i; d > 0 && strides_[kOut][d - 1] < strides_[kOut][d]; --d) {
        std::swap(sizes_[d - 1], sizes_[d]);
        for (int k = 0; k < count_; ++k) std::swap(strides_[k][d - 1], strides_[k][d]);
      }
    }
  }

  bool flat() const {
    if (rank_ == 0) return true;
    if (rank_ > 1) return false;
    for (int k = 0; k < count_; ++k) {
      if (strides_[k][0] != 1) return false;
    }
    return true;
  }

  // Dimension 0 innermost in all operands but the noise, which may lie either way.
  bool channels_last() const {
    for (int k = 0; k < count_; ++k) {
      if (operands_[k] != &call.noise && (strides_[k][0] != 1 || strides_[k][1] < sizes_[0])) return false;
    }
    return true;
  }

  int rank_ = 0, count_ = 0;
  int64_t sizes_[kMaxRank];
  int64_t strides_[kMaxOperands][kMaxRank];
  Operand* operands_[kMaxOperands] = {};
};

struct StepArguments {
  const Tensor& out;
  const Tensor* second = nullptr;
  const Tensor& x;
  const Tensor* model_output = nullptr;
  const Tensor* uncond = nullptr;
  const Tensor* scale = nullptr;
  const Tensor* noise = nullptr;
  const Tensor* seeds = nullptr;
  const Tensor& table;
  const Tensor* t = nullptr;
  const Tensor* t_to_row = nullptr;
  int64_t row = 0;
  int64_t flags = 0;
};

void run_step(const StepArguments& a) {
  CallBuilder builder(a.x, a.out);
  StepCall& call = builder.call;
  call.flags = int(a.flags);
  const DType state = call.x.dtype;
  const Variance variance = variance_of(call.flags);
  const bool learned = is_learned(variance);
  const Second second = second_of(call.flags);
  STD_TORCH_CHECK(variance <= Variance::kLearnedPlain && second <= Second::kVelocity, "fastdiff: flags: unknown bits");
  STD_TORCH_CHECK(a.second == nullptr || second == Second::kX0 || variance == Variance::kFixed,
                  "fastdiff: second: expected a variance without learning to make a target of");
  const bool needs_output = (call.flags & (kHasA0 | kHasAe)) || (a.second != nullptr && second == Second::kX0);
  STD_TORCH_CHECK(!needs_output || a.model_output != nullptr, "fastdiff: model_output: expected a tensor");
  int64_t channels = -1;
  if (learned) {
    STD_TORCH_CHECK(a.model_output != nullptr && a.x.dim() >= 2,
                    "fastdiff: model_output: expected [B, 2C, ...] for a learned variance");
    channels = 2 * a.x.size(1);
  }
  if (a.model_output != nullptr) {
    builder.add("model_output", call.model_output, *a.model_output, channels);
    const DType m = call.model_output.dtype;
    STD_TORCH_CHECK(m == state || (state == DType::kFloat32 && is_half(m)),
                    "fastdiff: model_output: expected x's dtype, or a half type beside a float32 x");
    if (learned) builder.add("model_output", call.learned, *a.model_output, channels, a.x.size(1));
  }
  if (a.uncond != nullptr) {
    STD_TORCH_CHECK(a.scale != nullptr && a.model_output != nullptr,
                    "fastdiff: uncond_output: expected model_output and guidance_scale with it");
    const int64_t uncond_channels = learned && a.uncond->size(1) == channels ? channels : -1;
    builder.add("uncond_output", call.uncond, *a.uncond, uncond_channels);
    STD_TORCH_CHECK(a.scale->is_cpu() && a.scale->scalar_type() == a.table.scalar_type() &&
                        (a.scale->numel() == 1 || (a.scale->dim() == 1 && a.scale->size(0) == call.batch)),
                    "fastdiff: guidance_scale: expected [B] or one element of the table's dtype on the CPU");
    call.scale = a.scale->data_ptr();
    call.scale_stride = a.scale->numel() == 1 ? 0 : a.scale->stride(0);
  }
  if (a.second != nullptr) {
    builder.add("second", call.second, *a.second);
    STD_TORCH_CHECK(call.second.dtype == state, "fastdiff: second: expected x's dtype");
  }
  STD_TORCH_CHECK(variance == Variance::kNone || (a.noise == nullptr) != (a.seeds == nullptr),
                  "fastdiff: expected either noise or seeds");
  if (variance != Variance::kNone && a.noise != nullptr) {
    builder.add("noise", call.noise, *a.noise);
    STD_TORCH_CHECK(call.noise.dtype != DType::kFloat64 || state == DType::kFloat64,
                    "fastdiff: noise: expected x's dtype, float32 or a half type");
  }
  if (variance != Variance::kNone && a.seeds != nullptr) {
    call.seeds_stride = checked_index("seeds", *a.seeds, call.batch, false);
    call.seeds = static_cast<const int64_t*>(a.seeds->data_ptr());
  }
  call.table_rows = checked_table(a.table, state);
  call.table = a.table.data_ptr();
  call.row = a.row;
  if (a.t != nullptr) {
    STD_TORCH_CHECK(a.t_to_row != nullptr && a.t_to_row->dim() == 1 && a.t_to_row->is_cpu() &&
                        a.t_to_row->scalar_type() == ScalarType::Long && a.t_to_row->is_contiguous(),
                    "fastdiff: t_to_row: expected a contiguous int64 vector on the CPU");
    call.t_stride = checked_index("t", *a.t, call.batch, true);
    call.t = static_cast<const int64_t*>(a.t->data_ptr());
    call.t_to_row = static_cast<const int64_t*>(a.t_to_row->data_ptr());
    call.t_count = a.t_to_row->size(0);
  } else {
    STD_TORCH_CHECK(a.row >= 0 && a.row < call.table_rows, "fastdiff: row: expected 0 to ", call.table_rows - 1,
                    ", got ", a.row);
  }
  if (call.batch * call.sample == 0) return;
  builder.check_output("out", call.out);
  if (a.second != nullptr) builder.check_output("second", call.second);
  for (const Operand* output : {&call.out, &call.second}) {
    if (output->data == nullptr) continue;
    if (call.seeds != nullptr) builder.check_index_apart("seeds", *a.seeds, *output);
    if (call.t != nullptr) builder.check_index_apart("t", *a.t, *output);
  }
  builder.finish();
  run_units(kernels().step, call);
}

const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

void step(Tensor out, std::optional<Tensor> second, Tensor x, std::optional<Tensor> model_output,
          std::optional<Tensor> uncond, std::optional<Tensor> scale, std::optional<Tensor> noise,
          std::optional<Tensor> seeds, Tensor table, std::optional<Tensor> t, std::optional<Tensor> t_to_row,
          int64_t row, int64_t flags) {
  run_step({out, pointer(second), x, pointer(model_output), pointer(uncond), pointer(scale), pointer(noise),
            pointer(seeds), table, pointer(t), pointer(t_to_row), row, flags});
}

// The common case in few arguments, each of which costs 0.2 us on its way through the dispatcher. noise: like x, or
// int64 seeds.
void step_row(Tensor out, Tensor x, Tensor model_output, std::optional<Tensor> noise, Tensor table, int64_t row,
              int64_t flags) {
  const Tensor* const given = pointer(noise);
  const bool seeds = given != nullptr && given->scalar_type() == ScalarType::Long;
  run_step({out, nullptr, x, &model_output, nullptr, nullptr, seeds ? nullptr : given, seeds ? given : nullptr, table,
            nullptr, nullptr, row, flags});
}

void normals(Tensor out, Tensor seeds, int64_t t, int64_t repeat, int64_t domain) {
  STD_TORCH_CHECK(out.is_cpu() && out.dim() >= 1 && out.is_contiguous(),
                  "fastdiff: out: expected a contiguous CPU tensor with a batch dimension");
  NormalsCall call;
  call.out.dtype = checked_dtype("out", out);
  call.batch = out.size(0);
  if (out.numel() == 0) return;
  call.sample = out.numel() / call.batch;
  call.out.data = static_cast<char*>(out.data_ptr());
  call.seeds_stride = checked_index("seeds", seeds, call.batch, false);
  call.seeds = static_cast<const int64_t*>(seeds.data_ptr());
  call.t = uint32_t(t);
  call.repeat = uint32_t(repeat);
  call.domain = uint32_t(domain);
  run_units(kernels().normals, call);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) {
  m.impl("step", TORCH_BOX(&step));
  m.impl("step_row", TORCH_BOX(&step_row));
  m.impl("normals", TORCH_BOX(&normals));
}

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CompositeExplicitAutograd, m) { m.impl("cpu_isa", TORCH_BOX(&cpu_isa)); }

}  // namespace fastdiff
