// What every entry of the library checks before it touches memory. Python raises TypeError and ValueError with the
// user's words (fastdiff/ops.py); these checks guard direct callers of the operators and arrive as RuntimeError.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <initializer_list>
#include <optional>
#include <utility>

#include "threshold.h"

namespace fastdiff {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// The device that all tensors of a call are on.
class Place {
 public:
  explicit Place(const Tensor& x) : cpu_(x.is_cpu()), index_(cpu_ ? 0 : x.get_device_index()) {}

  bool holds(const Tensor& tensor) const {
    return cpu_ ? tensor.is_cpu() : tensor.is_cuda() && tensor.get_device_index() == index_;
  }

  void check(const char* name, const Tensor& tensor) const {
    STD_TORCH_CHECK(holds(tensor), "fastdiff: ", name, ": expected a tensor on x's device");
  }

 private:
  bool cpu_;
  int32_t index_;
};

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
inline int64_t checked_index(const char* name, const Tensor& tensor, const Place& place, int64_t batch, bool shared) {
  STD_TORCH_CHECK(place.holds(tensor) && tensor.scalar_type() == ScalarType::Long, "fastdiff: ", name,
                  ": expected an int64 tensor on x's device");
  if (shared && tensor.numel() == 1) return 0;
  const auto sizes = tensor.sizes();
  STD_TORCH_CHECK(sizes.size() == 1 && sizes[0] == batch, "fastdiff: ", name, ": expected shape [", batch, "]");
  return tensor.strides()[0];
}

// The rows, contiguous [S, kColumns]; float64 exactly for a float64 state. Returns S.
inline int64_t checked_table(const Tensor& table, const Place& place, DType state) {
  const ScalarType expected = state == DType::kFloat64 ? ScalarType::Double : ScalarType::Float;
  const auto sizes = table.sizes();
  STD_TORCH_CHECK(place.holds(table) && table.scalar_type() == expected && sizes.size() == 2 && sizes[1] == kColumns &&
                      table.is_contiguous(),
                  "fastdiff: table: expected a contiguous [S, ", int(kColumns),
                  "] tensor on x's device, float64 for a float64 state, else float32");
  return sizes[0];
}

// A call under construction: the operands with all their dimensions, merged and ordered by finish().
class CallBuilder {
 public:
  // like: a tensor of the shape of x.
  CallBuilder(const char* name, const Tensor& like, Call& call, Shape& shape)
      : place_(like), call_(call), shape_(shape) {
    const auto sizes = like.sizes();
    STD_TORCH_CHECK(sizes.size() >= 1, "fastdiff: ", name, ": expected a batch dimension");
    STD_TORCH_CHECK(sizes.size() <= kMaxRank + 1, "fastdiff: ", name, ": expected at most ", kMaxRank + 1,
                    " dimensions");
    rank_ = int(sizes.size()) - 1;
    call_.batch = sizes[0];
    call_.sample = 1;
    for (int d = 0; d < rank_; ++d) {
      sizes_[d] = sizes[d + 1];
      call_.sample *= sizes_[d];
    }
  }

  const Place& place() const { return place_; }

  void add(const char* name, Operand& operand, const Tensor& tensor, int64_t channels = -1, int64_t first_channel = 0) {
    place_.check(name, tensor);
    operand.dtype = checked_dtype(name, tensor);
    const auto sizes = tensor.sizes();
    const auto strides = tensor.strides();
    STD_TORCH_CHECK(int(sizes.size()) == rank_ + 1, "fastdiff: ", name, ": expected ", rank_ + 1, " dimensions, got ",
                    sizes.size());
    for (int d = 0; d <= rank_; ++d) {
      const int64_t expected = d == 1 && channels >= 0 ? channels : d == 0 ? call_.batch : sizes_[d - 1];
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

  // An output is memory of its own, or exactly that of an input, each element of which is read before it is written.
  // other_output: what it must not share memory with even so.
  void check_output(const char* name, const Operand& output, bool in_place, const Operand* other_output) const {
    const int index = index_of(output);
    const Extents extents(*this, index);
    STD_TORCH_CHECK(!extents.overlap(), "fastdiff: ", name, ": expected distinct elements");
    for (int k = 0; k < count_; ++k) {
      const Operand& other = *operands_[k];
      if (k == index || other.data >= output.data + reach(index) || output.data >= other.data + reach(k)) continue;
      bool apart = false;
      if (other.dtype == output.dtype && same_strides(k, index)) {
        const int64_t bytes = other.data - output.data, size = element_size(output.dtype);
        if (bytes == 0 && in_place && &other != other_output) continue;
        apart = bytes % size == 0 && !extents.contain(bytes / size);
      }
      STD_TORCH_CHECK(apart, "fastdiff: ", name, ": expected memory of its own, or for out exactly that of an input");
    }
  }

  // A vector, or a single element, is read while outputs are written.
  void check_vector_apart(const char* name, const Tensor& vector, const Operand& output) const {
    STD_TORCH_CHECK(!meet(range_of(vector), range_of(index_of(output))), "fastdiff: ", name,
                    ": expected memory apart from that of out");
  }

  // As well as the seeds and timesteps that a call uses.
  void check_indices_apart(const Tensor* seeds, const Tensor* t, const Operand& output) const {
    if (output.data == nullptr) return;
    if (call_.seeds != nullptr) check_vector_apart("seeds", *seeds, output);
    if (call_.t != nullptr) check_vector_apart("t", *t, output);
  }

  // Sums, contiguous and no operand, are written while operands and vectors are read.
  template <class... Vectors>
  void check_sums(const char* name, const Tensor& sums, const Vectors*... vectors) const {
    const char* const first = static_cast<const char*>(sums.data_ptr());
    const Range range = {first, first + sums.numel() * int64_t(sums.element_size())};
    bool apart = ((vectors == nullptr || !meet(range, range_of(*vectors))) && ...);
    for (int k = 0; k < count_; ++k) apart = apart && !meet(range, range_of(k));
    STD_TORCH_CHECK(apart, "fastdiff: ", name, ": expected memory of its own");
  }

  // Merges what can be merged and picks the layout. Where no noise is made from an index, logical order means nothing
  // and the dimensions are first put in the memory order of an output. free_noise: noise that may lie otherwise without
  // making channels-last operands strided ones. sums: whether elements must be met in logical order, sample by sample.
  void finish(bool logical_order, const Operand& output, const Operand& free_noise, bool sums = false) {
    drop_ones();
    merge();
    if (!logical_order && !sums && !flat()) {
      sort_by(index_of(output));
      merge();
    }
    if (flat()) {
      shape_.layout = Layout::kFlat;
    } else if (rank_ == 2 && !sums && channels_last(free_noise)) {
      shape_.layout = Layout::kChannelsLast;
    } else {
      shape_.layout = Layout::kStrided;
    }
    shape_.ndim = rank_;
    for (int d = 0; d < rank_; ++d) shape_.sizes[d] = sizes_[d];
    for (int k = 0; k < count_; ++k) {
      for (int d = 0; d < rank_; ++d) operands_[k]->strides[d] = strides_[k][d];
    }
  }

  // Samples that follow one another and share their row are one long sample: short ones would cost a call each.
  void join_samples() {
    bool shared = shape_.layout == Layout::kFlat && call_.batch > 1 && call_.scale_stride == 0;
    shared = shared && (call_.t == nullptr || call_.t_stride == 0);
    for (int k = 0; k < count_; ++k) shared = shared && operands_[k]->batch_stride == call_.sample;
    if (!shared) return;
    if (call_.seeds != nullptr) shape_.joined = call_.sample;
    call_.sample *= call_.batch;
    call_.batch = 1;
  }

 private:
  static constexpr int kMaxRank = kMaxDims;
  static constexpr int kMaxOperands = 12;

  // Bytes [first, last).
  struct Range {
    const char *first, *last;
  };

  static bool meet(const Range& a, const Range& b) { return a.first < b.last && b.first < a.last; }

  static Range range_of(const Tensor& vector) {
    const char* const first = static_cast<const char*>(vector.data_ptr());
    const int64_t n = vector.numel(), last = n <= 1 ? n : (n - 1) * vector.strides()[0] + 1;
    return {first, first + last * int64_t(vector.element_size())};
  }

  Range range_of(int k) const { return {operands_[k]->data, operands_[k]->data + reach(k)}; }

  int index_of(const Operand& operand) const {
    int k = 0;
    while (operands_[k] != &operand) ++k;
    return k;
  }

  // Bytes from the first element of an operand to the end of its last.
  int64_t reach(int k) const {
    int64_t last = (call_.batch - 1) * operands_[k]->batch_stride;
    for (int d = 0; d < rank_; ++d) last += (sizes_[d] - 1) * strides_[k][d];
    return (last + 1) * element_size(operands_[k]->dtype);
  }

  bool same_strides(int k, int other) const {
    bool same = call_.batch == 1 || operands_[k]->batch_stride == operands_[other]->batch_stride;
    for (int d = 0; d < rank_; ++d) same = same && (sizes_[d] == 1 || strides_[k][d] == strides_[other][d]);
    return same;
  }

  // The dimensions of an operand, the batch included, in ascending order of stride.
  struct Extents {
    int64_t strides[kMaxDims + 1], sizes[kMaxDims + 1];
    int n = 0;

    Extents(const CallBuilder& builder, int k) {
      for (int d = -1; d < builder.rank_; ++d) {
        const int64_t size = d < 0 ? builder.call_.batch : builder.sizes_[d];
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

  void sort_by(int leader) {
    for (int i = 1; i < rank_; ++i) {
      for (int d = i; d > 0 && strides_[leader][d - 1] < strides_[leader][d]; --d) {
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
  bool channels_last(const Operand& free_noise) const {
    for (int k = 0; k < count_; ++k) {
      if (operands_[k] != &free_noise && (strides_[k][0] != 1 || strides_[k][1] < sizes_[0])) return false;
    }
    return true;
  }

  const Place place_;
  Call& call_;
  Shape& shape_;
  int rank_ = 0, count_ = 0;
  int64_t sizes_[kMaxRank];
  int64_t strides_[kMaxOperands][kMaxRank];
  Operand* operands_[kMaxOperands] = {};
};

// The dtypes that a model output, or the gradient of one, may have beside a state.
inline void check_model_dtype(const char* name, DType dtype, DType state) {
  STD_TORCH_CHECK(dtype == state || (state == DType::kFloat32 && is_half(dtype)), "fastdiff: ", name,
                  ": expected x's dtype, or a half type beside a float32 x");
}

inline void check_noise_dtype(const char* name, DType dtype, DType state) {
  STD_TORCH_CHECK(dtype != DType::kFloat64 || state == DType::kFloat64, "fastdiff: ", name,
                  ": expected x's dtype, float32 or a half type");
}

inline void add_scale(const Tensor& scale, const Tensor& table, const Place& place, Call& call) {
  STD_TORCH_CHECK(place.holds(scale) && scale.scalar_type() == table.scalar_type() &&
                      (scale.numel() == 1 || (scale.dim() == 1 && scale.size(0) == call.batch)),
                  "fastdiff: guidance_scale: expected [B] or one element of the table's dtype on x's device");
  call.scale = scale.data_ptr();
  call.scale_stride = scale.numel() == 1 ? 0 : scale.stride(0);
}

inline void add_seeds(const Tensor& seeds, const Place& place, Call& call) {
  call.seeds_stride = checked_index("seeds", seeds, place, call.batch, false);
  call.seeds = static_cast<const int64_t*>(seeds.data_ptr());
}

inline void add_rows(const Tensor& table, const Tensor* t, const Tensor* t_to_row, int64_t row, const Place& place,
                     DType state, Call& call) {
  call.table_rows = checked_table(table, place, state);
  call.table = table.data_ptr();
  call.row = row;
  if (t == nullptr) {
    STD_TORCH_CHECK(row >= 0 && row < call.table_rows, "fastdiff: row: expected 0 to ", call.table_rows - 1, ", got ",
                    row);
    return;
  }
  STD_TORCH_CHECK(t_to_row != nullptr && t_to_row->dim() == 1 && place.holds(*t_to_row) &&
                      t_to_row->scalar_type() == ScalarType::Long && t_to_row->is_contiguous(),
                  "fastdiff: t_to_row: expected a contiguous int64 vector on x's device");
  call.t_stride = checked_index("t", *t, place, call.batch, true);
  call.t = static_cast<const int64_t*>(t->data_ptr());
  call.t_to_row = static_cast<const int64_t*>(t_to_row->data_ptr());
  call.t_count = t_to_row->size(0);
}

// Sums over samples: of the table's dtype, contiguous, and a number of its own for each sample or each of its sums.
inline void check_sums(const char* name, const Tensor& sums, const Tensor& table, const Place& place, int64_t batch,
                       int64_t count) {
  const auto sizes = sums.sizes();
  const bool fits = count == 0 ? sizes.size() == 1 : sizes.size() == 2 && sizes[1] == count;
  STD_TORCH_CHECK(place.holds(sums) && sums.scalar_type() == table.scalar_type() && fits && sizes[0] == batch &&
                      sums.is_contiguous(),
                  "fastdiff: ", name, ": expected a contiguous tensor of shape [", batch,
                  count == 0 ? "" : ", columns + 1", "] of the table's dtype on x's device");
}

inline void set_to_zero(Tensor tensor) { torch::stable::zero_(tensor); }

inline void check_min_std(double min_std) {
  STD_TORCH_CHECK(min_std >= 0, "fastdiff: min_std: expected a number that is not negative, got ", min_std);
}

struct StepArguments {
  const Tensor* out;  // null only where x' is given (DistanceArguments)
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
  bool draws = false;  // the noise of torch's own stream, made in the kernel
};

inline const Tensor* pointer(const std::optional<Tensor>& tensor) { return tensor.has_value() ? &*tensor : nullptr; }

// Adds the operands of a step and its rows to a call.
inline void add_step(CallBuilder& builder, const StepArguments& a, StepCall& call) {
  builder.add("x", call.x, a.x);
  const DType state = call.x.dtype;
  if (a.out != nullptr) {
    builder.add("out", call.out, *a.out);
    STD_TORCH_CHECK(call.out.dtype == state, "fastdiff: out: expected x's dtype");
  }
  const Place& place = builder.place();
  call.flags = int(a.flags);
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
    check_model_dtype("model_output", call.model_output.dtype, state);
    if (learned) builder.add("model_output", call.learned, *a.model_output, channels, a.x.size(1));
  }
  if (a.uncond != nullptr) {
    STD_TORCH_CHECK(a.scale != nullptr && a.model_output != nullptr,
                    "fastdiff: uncond_output: expected model_output and guidance_scale with it");
    const int64_t uncond_channels = learned && a.uncond->size(1) == channels ? channels : -1;
    builder.add("uncond_output", call.uncond, *a.uncond, uncond_channels);
    STD_TORCH_CHECK(call.uncond.dtype == call.model_output.dtype,
                    "fastdiff: uncond_output: expected model_output's dtype");
    add_scale(*a.scale, a.table, place, call);
  }
  if (a.second != nullptr) {
    builder.add("second", call.second, *a.second);
    STD_TORCH_CHECK(call.second.dtype == state, "fastdiff: second: expected x's dtype");
  }
  const bool noisy = variance != Variance::kNone && a.out != nullptr;
  STD_TORCH_CHECK(!noisy || a.draws || (a.noise == nullptr) != (a.seeds == nullptr),
                  "fastdiff: expected either noise or seeds");
  if (noisy && a.noise != nullptr) {
    builder.add("noise", call.noise, *a.noise);
    check_noise_dtype("noise", call.noise.dtype, state);
  }
  if (noisy && a.seeds != nullptr) add_seeds(*a.seeds, place, call);
  add_rows(a.table, a.t, a.t_to_row, a.row, place, state, call);
}

// Checks the arguments of a step and makes them a call; false where there is nothing to do. Samples are joined across
// seeds only where the loops can tell them apart again.
inline bool make_call(const StepArguments& a, StepCall& call, bool join_seeded) {
  CallBuilder builder("x", a.x, call, call);
  add_step(builder, a, call);
  if (call.batch * call.sample == 0) return false;
  // the second output may be written before the inputs are read
  builder.check_output("out", call.out, true, &call.second);
  if (a.second != nullptr) builder.check_output("second", call.second, false, nullptr);
  for (const Operand* output : {&call.out, &call.second}) {
    builder.check_indices_apart(a.seeds, a.t, *output);
    if (a.uncond != nullptr && output->data != nullptr) {
      builder.check_vector_apart("guidance_scale", *a.scale, *output);
    }
  }
  builder.finish(call.seeds != nullptr || a.draws, call.out, call.noise);
  if (call.seeds == nullptr || join_seeded) builder.join_samples();
  return true;
}

// The operators `step` and `step_row` as the dispatcher calls them.
template <void (*kRun)(const StepArguments&)>
void step_operator(const Tensor& out, const std::optional<Tensor>& second, const Tensor& x,
                   const std::optional<Tensor>& model_output, const std::optional<Tensor>& uncond,
                   const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                   const std::optional<Tensor>& seeds, const Tensor& table, const std::optional<Tensor>& t,
                   const std::optional<Tensor>& t_to_row, int64_t row, int64_t flags) {
  kRun({&out, pointer(second), x, pointer(model_output), pointer(uncond), pointer(scale), pointer(noise),
        pointer(seeds), table, pointer(t), pointer(t_to_row), row, flags});
}

// The common case in tensors alone, few of them: on its way through the dispatcher an optional one costs twice as much,
// and a number still more. place: the row and the flags, int64 [2] on the CPU. noise: like x, or int64 seeds; any
// tensor where the flags say that there is none.
template <void (*kRun)(const StepArguments&)>
void step_row_operator(const Tensor& out, const Tensor& x, const Tensor& model_output, const Tensor& noise,
                       const Tensor& table, const Tensor& place) {
  STD_TORCH_CHECK(
      place.is_cpu() && place.scalar_type() == ScalarType::Long && place.numel() == 2 && place.is_contiguous(),
      "fastdiff: place: expected int64 [2] on the CPU, the row and the flags");
  const int64_t* const numbers = static_cast<const int64_t*>(place.data_ptr());
  const bool noisy = variance_of(int(numbers[1])) != Variance::kNone;
  const bool seeds = noisy && noise.scalar_type() == ScalarType::Long;
  kRun({&out, nullptr, x, &model_output, nullptr, nullptr, noisy && !seeds ? &noise : nullptr, seeds ? &noise : nullptr,
        table, nullptr, nullptr, numbers[0], numbers[1]});
}

struct DistanceArguments : StepArguments {
  const Tensor* squares = nullptr;
  const Tensor* distance = nullptr;
  const Tensor* x_prev = nullptr;
  double min_std = 0;
};

// Checks the arguments of a distance and makes them a call; false where there is nothing more to do.
inline bool make_call(const DistanceArguments& a, DistanceCall& call) {
  STD_TORCH_CHECK((a.out != nullptr) != (a.x_prev != nullptr), "fastdiff: expected either out or x_prev");
  STD_TORCH_CHECK(a.x_prev == nullptr || (a.noise == nullptr && a.seeds == nullptr),
                  "fastdiff: x_prev: expected neither noise nor seeds with it");
  STD_TORCH_CHECK(a.squares != nullptr || a.distance != nullptr, "fastdiff: squares: expected it, or distance");
  STD_TORCH_CHECK(variance_of(int(a.flags)) == Variance::kFixed && (a.flags & (kHasA0 | kHasAx | kHasAe)),
                  "fastdiff: flags: expected a mean, and a variance without learning");
  check_min_std(a.min_std);
  call.min_std = a.min_std;
  CallBuilder builder("x", a.x, call, call);
  add_step(builder, a, call);
  const DType state = call.x.dtype;
  if (a.x_prev != nullptr) {
    builder.add("x_prev", call.x_prev, *a.x_prev);
    STD_TORCH_CHECK(call.x_prev.dtype == state, "fastdiff: x_prev: expected x's dtype");
  }
  if (a.squares != nullptr) {
    builder.add("squares", call.squares, *a.squares);
    STD_TORCH_CHECK(a.squares->scalar_type() == a.table.scalar_type(), "fastdiff: squares: expected the table's dtype");
  }
  if (a.distance != nullptr) check_sums("distance", *a.distance, a.table, builder.place(), call.batch, 0);
  if (call.batch * call.sample == 0) {
    if (a.distance != nullptr) set_to_zero(*a.distance);
    return false;
  }
  if (a.out != nullptr) builder.check_output("out", call.out, true, &call.squares);
  if (a.squares != nullptr) builder.check_output("squares", call.squares, false, nullptr);
  for (const Operand* output : {&call.out, &call.squares}) builder.check_indices_apart(a.seeds, a.t, *output);
  if (a.distance != nullptr) builder.check_sums("distance", *a.distance, a.seeds, a.t);
  builder.finish(call.seeds != nullptr, a.out != nullptr ? call.out : call.x_prev, call.noise, a.distance != nullptr);
  return true;
}

// The operator `step_distance` as the dispatcher calls it.
template <void (*kRun)(const DistanceArguments&)>
void step_distance_operator(const std::optional<Tensor>& out, const std::optional<Tensor>& squares,
                            const std::optional<Tensor>& distance, const std::optional<Tensor>& x_prev, const Tensor& x,
                            const std::optional<Tensor>& model_output, const std::optional<Tensor>& uncond,
                            const std::optional<Tensor>& scale, const std::optional<Tensor>& noise,
                            const std::optional<Tensor>& seeds, const Tensor& table, const std::optional<Tensor>& t,
                            const std::optional<Tensor>& t_to_row, int64_t row, int64_t flags, double min_std) {
  kRun({{pointer(out), nullptr, x, pointer(model_output), pointer(uncond), pointer(scale), pointer(noise),
         pointer(seeds), table, pointer(t), pointer(t_to_row), row, flags},
        pointer(squares),
        pointer(distance),
        pointer(x_prev),
        min_std});
}

struct BackwardArguments {
  const Tensor* grad_x = nullptr;
  const Tensor* grad_model_output = nullptr;
  const Tensor* grad_uncond = nullptr;
  const Tensor* grad_noise = nullptr;
  const Tensor* grad = nullptr;
  const Tensor* grad_second = nullptr;
  const Tensor* x = nullptr;
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
  const Tensor* sums = nullptr;
  const Tensor* x_prev = nullptr;
  const Tensor* grad_distance = nullptr;
  double min_std = 0;
};

// A tensor of the shape and the dtype of x.
inline const Tensor& like_of(const BackwardArguments& a) {
  return a.grad != nullptr ? *a.grad : a.grad_second != nullptr ? *a.grad_second : *a.x_prev;
}

// Checks the arguments of a backward and makes them a call; false where there is nothing to do. Of the inputs of the
// step, those that the gradients do not depend on are not looked at. join_seeded as for a step.
inline bool make_call(const BackwardArguments& a, SumsCall& call, bool join_seeded) {
  STD_TORCH_CHECK(a.grad != nullptr || a.grad_second != nullptr || a.grad_distance != nullptr,
                  "fastdiff: grad: expected it, or grad_second or grad_distance");
  STD_TORCH_CHECK((a.grad_distance != nullptr) == (a.x_prev != nullptr),
                  "fastdiff: x_prev and grad_distance: expected both or neither");
  const char* const name = a.grad != nullptr ? "grad" : a.grad_second != nullptr ? "grad_second" : "x_prev";
  const Tensor& like = like_of(a);
  CallBuilder builder(name, like, call, call);
  const Place& place = builder.place();
  call.state = checked_dtype(name, like);
  call.flags = int(a.flags);
  const DType state = call.state;
  const Variance variance = variance_of(call.flags);
  const bool learned = is_learned(variance);
  const Second second = second_of(call.flags);
  STD_TORCH_CHECK(variance <= Variance::kLearnedPlain && second <= Second::kVelocity, "fastdiff: flags: unknown bits");
  const auto add_state = [&](const char* name, Operand& operand, const Tensor& tensor) {
    builder.add(name, operand, tensor);
    STD_TORCH_CHECK(operand.dtype == state, "fastdiff: ", name, ": expected x's dtype");
  };
  if (a.grad != nullptr) add_state("grad", call.grad, *a.grad);
  if (a.grad_second != nullptr) {
    STD_TORCH_CHECK(second == Second::kX0 || variance == Variance::kFixed,
                    "fastdiff: grad_second: expected a variance without learning with the gradient of a target");
    add_state("grad_second", call.grad_second, *a.grad_second);
  }
  if (a.grad_distance != nullptr) {
    STD_TORCH_CHECK(variance == Variance::kFixed && (call.flags & (kHasA0 | kHasAx | kHasAe)),
                    "fastdiff: grad_distance: expected none, but of a mean and a variance without learning");
    check_min_std(a.min_std);
    call.min_std = a.min_std;
    add_state("x_prev", call.x_prev, *a.x_prev);
    STD_TORCH_CHECK(a.grad_distance->scalar_type() == a.table.scalar_type(),
                    "fastdiff: grad_distance: expected the table's dtype");
    if (a.grad_distance->dim() == 1) {
      STD_TORCH_CHECK(place.holds(*a.grad_distance) && a.grad_distance->size(0) == call.batch,
                      "fastdiff: grad_distance: expected shape [", call.batch, "], or that of x, on x's device");
      call.grad_distance = a.grad_distance->data_ptr();
      call.grad_distance_stride = a.grad_distance->stride(0);
    } else {
      builder.add("grad_distance", call.grad_squares, *a.grad_distance);
    }
  }

  STD_TORCH_CHECK(!learned || like.dim() >= 2, "fastdiff: grad: expected [B, C, ...] for a learned variance");
  const int64_t channels = learned ? 2 * like.size(1) : -1;
  const auto add_model = [&](const char* name, Operand& operand, const Tensor& tensor, int64_t first_channel) {
    builder.add(name, operand, tensor, channels, first_channel);
    check_model_dtype(name, operand.dtype, state);
  };
  const auto add_uncond = [&](const char* name, Operand& operand, const Tensor& tensor) {
    builder.add(name, operand, tensor, learned && tensor.dim() >= 2 && tensor.size(1) == channels ? channels : -1);
    check_model_dtype(name, operand.dtype, state);
  };
  // Of the gradients: what is there to write. A variance half of grad_uncond is the caller's to fill.
  const Operand* leader = nullptr;
  const auto lead = [&](const Operand& operand) { leader = leader != nullptr ? leader : &operand; };
  if (a.grad_x != nullptr) {
    add_state("grad_x", call.grad_x, *a.grad_x);
    lead(call.grad_x);
  }
  if (a.grad_model_output != nullptr) {
    add_model("grad_model_output", call.grad_model, *a.grad_model_output, 0);
    if (learned) add_model("grad_model_output", call.grad_learned, *a.grad_model_output, like.size(1));
    lead(call.grad_model);
  }
  if (a.grad_uncond != nullptr) {
    STD_TORCH_CHECK(a.scale != nullptr, "fastdiff: grad_uncond_output: expected guidance_scale with it");
    add_uncond("grad_uncond_output", call.grad_uncond, *a.grad_uncond);
    lead(call.grad_uncond);
  }
  if (a.grad_noise != nullptr) {
    STD_TORCH_CHECK(variance != Variance::kNone, "fastdiff: grad_noise: expected none, the step adds no noise");
    builder.add("grad_noise", call.grad_noise, *a.grad_noise);
    check_noise_dtype("grad_noise", call.grad_noise.dtype, state);
    lead(call.grad_noise);
  }

  if (a.scale != nullptr) add_scale(*a.scale, a.table, place, call);
  const bool has_mean = a.grad != nullptr || a.grad_distance != nullptr;
  const bool masked = masks_clip(call.flags, has_mean, a.grad_second != nullptr);
  const bool again = a.sums != nullptr || a.grad_distance != nullptr;  // the step is computed once more
  const bool reads_output =
      masked ||
      (again && ((call.flags & (kHasA0 | kHasAe)) || reaches_x0(call.flags, has_mean, a.grad_second != nullptr)));
  if (masked || again) {
    STD_TORCH_CHECK(a.x != nullptr, "fastdiff: x: expected a tensor, to compute the step again");
    add_state("x", call.x, *a.x);
  }
  if (reads_output) {
    STD_TORCH_CHECK((a.uncond != nullptr) == (a.scale != nullptr),
                    "fastdiff: uncond_output and guidance_scale: expected both or neither");
    if (a.uncond != nullptr) add_uncond("uncond_output", call.uncond, *a.uncond);
  }
  const bool reads_learned = learned && a.grad != nullptr;
  STD_TORCH_CHECK(!(reads_output || reads_learned) || a.model_output != nullptr,
                  "fastdiff: model_output: expected a tensor");
  if (reads_output) add_model("model_output", call.model_output, *a.model_output, 0);
  if (reads_learned) add_model("model_output", call.learned, *a.model_output, like.size(1));
  const bool of_velocity = a.grad_second != nullptr && second == Second::kVelocity;
  const bool noisy =
      reads_learned || (a.sums != nullptr && variance != Variance::kNone && (a.grad != nullptr || of_velocity));
  if (noisy) {
    STD_TORCH_CHECK((a.noise == nullptr) != (a.seeds == nullptr), "fastdiff: expected either noise or seeds");
    if (a.noise != nullptr) {
      builder.add("noise", call.noise, *a.noise);
      check_noise_dtype("noise", call.noise.dtype, state);
    } else {
      add_seeds(*a.seeds, place, call);
    }
  }
  add_rows(a.table, a.t, a.t_to_row, a.row, place, state, call);
  if (a.sums != nullptr) check_sums("sums", *a.sums, a.table, place, call.batch, kSums);
  if (call.batch * call.sample == 0) {
    if (a.sums != nullptr) set_to_zero(*a.sums);
    return false;
  }
  if (leader == nullptr && a.sums == nullptr) return false;

  const std::pair<const char*, const Operand*> outputs[] = {{"grad_x", &call.grad_x},
                                                            {"grad_model_output", &call.grad_model},
                                                            {"grad_model_output", &call.grad_learned},
                                                            {"grad_uncond_output", &call.grad_uncond},
                                                            {"grad_noise", &call.grad_noise}};
  for (const auto& [name, output] : outputs) {
    if (output->data == nullptr) continue;
    builder.check_output(name, *output, false, nullptr);
    builder.check_indices_apart(a.seeds, a.t, *output);
    if (call.grad_distance != nullptr) builder.check_vector_apart("grad_distance", *a.grad_distance, *output);
  }
  if (a.sums != nullptr) {
    builder.check_sums("sums", *a.sums, a.seeds, a.t, call.grad_distance != nullptr ? a.grad_distance : nullptr);
  }
  builder.finish(call.seeds != nullptr, leader != nullptr ? *leader : call.x, call.noise, a.sums != nullptr);
  if (!again && (call.seeds == nullptr || join_seeded)) builder.join_samples();
  return true;
}

// The operator `step_backward` as the dispatcher calls it.
template <void (*kRun)(const BackwardArguments&)>
void step_backward_operator(const std::optional<Tensor>& grad_x, const std::optional<Tensor>& grad_model_output,
                            const std::optional<Tensor>& grad_uncond, const std::optional<Tensor>& grad_noise,
                            const std::optional<Tensor>& grad, const std::optional<Tensor>& grad_second,
                            const std::optional<Tensor>& x, const std::optional<Tensor>& model_output,
                            const std::optional<Tensor>& uncond, const std::optional<Tensor>& scale,
                            const std::optional<Tensor>& noise, const std::optional<Tensor>& seeds, const Tensor& table,
                            const std::optional<Tensor>& t, const std::optional<Tensor>& t_to_row, int64_t row,
                            int64_t flags, const std::optional<Tensor>& sums, const std::optional<Tensor>& x_prev,
                            const std::optional<Tensor>& grad_distance, double min_std) {
  kRun({pointer(grad_x),
        pointer(grad_model_output),
        pointer(grad_uncond),
        pointer(grad_noise),
        pointer(grad),
        pointer(grad_second),
        pointer(x),
        pointer(model_output),
        pointer(uncond),
        pointer(scale),
        pointer(noise),
        pointer(seeds),
        table,
        pointer(t),
        pointer(t_to_row),
        row,
        flags,
        pointer(sums),
        pointer(x_prev),
        pointer(grad_distance),
        min_std});
}

// The arguments of the operator `dynamic_threshold`; false where there is nothing to do.
inline bool make_call(const Tensor& out, const Tensor& x0, double ratio, double max_value, ThresholdCall& call) {
  CallBuilder builder("x0", x0, call, call);
  builder.add("x0", call.x, x0);
  builder.add("out", call.out, out);
  STD_TORCH_CHECK(call.out.dtype == call.x.dtype, "fastdiff: out: expected x0's dtype");
  STD_TORCH_CHECK(ratio >= 0 && ratio <= 1, "fastdiff: ratio: expected a number from 0 to 1, got ", ratio);
  STD_TORCH_CHECK(max_value > 0, "fastdiff: max_value: expected a number above 0, got ", max_value);
  call.ratio = ratio;
  call.max_value = max_value;
  if (call.batch * call.sample == 0) return false;
  builder.check_output("out", call.out, true, nullptr);
  const Operand no_noise = {};
  builder.finish(false, call.out, no_noise);
  return true;
}

// The arguments of the operator `normals`; false where there is nothing to do.
inline bool make_call(const Tensor& out, const Tensor& seeds, int64_t t, int64_t repeat, int64_t domain,
                      NormalsCall& call) {
  STD_TORCH_CHECK(out.dim() >= 1 && out.is_contiguous(),
                  "fastdiff: out: expected a contiguous tensor with a batch dimension");
  call.out.dtype = checked_dtype("out", out);
  call.batch = out.size(0);
  if (out.numel() == 0) return false;
  call.sample = out.numel() / call.batch;
  call.out.data = static_cast<char*>(out.data_ptr());
  call.seeds_stride = checked_index("seeds", seeds, Place(out), call.batch, false);
  call.seeds = static_cast<const int64_t*>(seeds.data_ptr());
  call.t = uint32_t(t);
  call.repeat = uint32_t(repeat);
  call.domain = uint32_t(domain);
  return true;
}

}  // namespace fastdiff
