// Runs the kernels of one instruction set over exactly sized memory, in every layout and dtype and at the sizes where
// blocks, tiles and vectors end. Compiled with the address and undefined behaviour sanitizers, which end the program at
// the first byte read or written beyond its tensor; tests/test_sanitizers.py does that.
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../csrc/step_cpu.h"

using namespace fastdiff;

namespace {

const Kernels& kernels = FASTDIFF_ISA::kKernels;
constexpr int kNoise = int(Variance::kFixed) << kVarianceShift | int(kDomainStep) << kDomainShift;
constexpr int kLearnedNoise = int(Variance::kLearnedRange) << kVarianceShift | int(kDomainStep) << kDomainShift;
constexpr int kMean = kX0FromX | kClip | kHasA0 | kHasAx;
constexpr int kDdpm = kMean | kNoise;
constexpr int kDdim = kX0FromX | kClip | kHasA0 | kHasAe;
constexpr int kForward = kHasAx | kNoise;

// Memory that ends where the tensor ends, filled with zeros.
class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(static_cast<char*>(calloc(size_t(bytes), 1))) {}
  ~Memory() { free(data_); }
  Memory(const Memory&) = delete;
  char* data() const { return data_; }
  template <class T>
  T* as() const {
    return reinterpret_cast<T*>(data_);
  }

 private:
  char* data_;
};

// Every unit by itself, as threads would run them, and all of them as one range.
template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  const int64_t units = units_of(call);
  for (int64_t unit = 0; unit < units; ++unit) kernel(call, unit, unit + 1);
  kernel(call, 0, units);
}

// What a step may be given beside x and the model output.
struct Extras {
  Operand tensor;  // of x's shape, for every input that has it
  const void* scale;
  const int64_t *t, *t_to_row;
  int64_t t_count;
};

// The call with each of these extras, from which the kernel computes in other ways.
void run_kinds(const StepCall& call, const Extras& extras) {
  StepCall kind = call;
  kind.seeds = nullptr;
  kind.noise = extras.tensor;
  run(kernels.step, kind);

  kind = call;
  kind.flags = kMean | kLearnedNoise | (call.flags & kHostRounding);
  kind.learned = extras.tensor;
  run(kernels.step, kind);

  kind = call;
  kind.uncond = extras.tensor;
  kind.scale = extras.scale;
  kind.scale_stride = 1;
  run(kernels.step, kind);

  kind = call;
  kind.t = extras.t;
  kind.t_stride = 1;
  kind.t_to_row = extras.t_to_row;
  kind.t_count = extras.t_count;
  run(kernels.step, kind);
  kind.seeds = nullptr;
  kind.flags = kDdim | (call.flags & kHostRounding);
  run(kernels.step, kind);

  kind = call;
  kind.flags = kForward | int(Second::kVelocity) << kSecondShift | (call.flags & kHostRounding);
  run(kernels.step, kind);
}

// The backward of a call, from gradients of its shape (`tensor`) into one block of memory per gradient.
BackwardCall backward_of(const StepCall& call, const Operand& tensor, const Operand (&gradients)[5]) {
  BackwardCall back;
  static_cast<Call&>(back) = call;
  static_cast<Shape&>(back) = call;
  back.state = call.x.dtype;
  back.grad = back.grad_second = tensor;
  back.x = call.x;
  back.model_output = call.model_output;
  back.grad_x = gradients[0];
  back.grad_model = gradients[1];
  back.grad_noise = gradients[2];
  back.seeds = nullptr;  // a fixed variance needs no noise
  return back;
}

// With a clip and without, with each gradient alone, guidance, a learned variance, timesteps and rounding by a host.
void run_backward(const BackwardCall& call, const Extras& extras, const Operand (&gradients)[5], const int64_t* seeds) {
  BackwardCall kind = call;
  run(kernels.step_backward, kind);
  kind.grad.data = nullptr;
  run(kernels.step_backward, kind);

  kind = call;
  kind.grad_second.data = kind.x.data = kind.model_output.data = nullptr;
  kind.flags = kDdim & ~kClip;
  run(kernels.step_backward, kind);

  kind = call;
  kind.uncond = extras.tensor;
  kind.grad_uncond = gradients[3];
  kind.scale = extras.scale;
  kind.scale_stride = 1;
  run(kernels.step_backward, kind);

  kind = call;
  kind.flags = kMean | kLearnedNoise | (call.flags & kHostRounding);
  kind.learned = extras.tensor;
  kind.grad_learned = gradients[4];
  kind.noise = extras.tensor;
  run(kernels.step_backward, kind);
  kind.noise.data = nullptr;
  kind.seeds = seeds;
  kind.seeds_stride = 1;
  run(kernels.step_backward, kind);
  if (call.layout == Layout::kFlat && call.joined == 0) {
    kind.joined = call.sample;
    kind.sample *= call.batch;
    kind.batch = 1;
    run(kernels.step_backward, kind);
  }

  kind = call;
  kind.t = extras.t;
  kind.t_stride = 1;
  kind.t_to_row = extras.t_to_row;
  kind.t_count = extras.t_count;
  run(kernels.step_backward, kind);

  kind = call;
  kind.flags = kForward | int(Second::kVelocity) << kSecondShift | (call.flags & kHostRounding);
  kind.x.data = kind.model_output.data = nullptr;
  run(kernels.step_backward, kind);
}

// The distances of a call, of x' as it is made and as it is given, each element's and in sums.
void run_distance(const StepCall& call, const Extras& extras, void* sums) {
  DistanceCall kind;
  static_cast<StepCall&>(kind) = call;
  kind.second.data = nullptr;
  kind.squares = call.second;
  kind.squares.dtype = call.x.dtype == DType::kFloat64 ? DType::kFloat64 : DType::kFloat32;
  kind.squares.data = nullptr;
  kind.sums = sums;
  run(kernels.step_distance, kind);
  kind.uncond = extras.tensor;
  kind.scale = extras.scale;
  kind.scale_stride = 1;
  kind.squares.data = call.x.dtype == kind.squares.dtype ? call.second.data : nullptr;
  kind.t = extras.t;
  kind.t_stride = 1;
  kind.t_to_row = extras.t_to_row;
  kind.t_count = extras.t_count;
  run(kernels.step_distance, kind);
  kind.out.data = nullptr;
  kind.seeds = nullptr;
  kind.x_prev = extras.tensor;
  run(kernels.step_distance, kind);
}

// The sums of a backward, of each kind of variance, and with the gradient of a distance or of each square.
void run_sums(const BackwardCall& call, const Extras& extras, const Operand (&gradients)[5], const int64_t* seeds,
              void* sums, const void* grads) {
  SumsCall kind;
  static_cast<BackwardCall&>(kind) = call;
  kind.uncond = extras.tensor;
  kind.grad_uncond = gradients[3];
  kind.scale = extras.scale;
  kind.scale_stride = 1;
  kind.sums = sums;
  kind.noise = extras.tensor;
  run(kernels.backward_sums, kind);
  kind.noise.data = nullptr;
  kind.seeds = seeds;
  kind.seeds_stride = 1;
  kind.x_prev = extras.tensor;
  kind.grad_distance = grads;
  kind.grad_distance_stride = 1;
  run(kernels.backward_sums, kind);
  kind.sums = nullptr;
  if (call.state == DType::kFloat32 || call.state == DType::kFloat64) {
    kind.grad_distance = nullptr;
    kind.grad_squares = extras.tensor;
  }
  run(kernels.backward_sums, kind);

  static_cast<BackwardCall&>(kind) = call;
  kind.x_prev.data = kind.grad_squares.data = nullptr;
  kind.grad_distance = nullptr;
  kind.flags = kMean | kLearnedNoise | (call.flags & kHostRounding);
  kind.learned = extras.tensor;
  kind.grad_learned = gradients[4];
  kind.noise = extras.tensor;
  kind.sums = sums;
  kind.t = extras.t;
  kind.t_stride = 1;
  kind.t_to_row = extras.t_to_row;
  kind.t_count = extras.t_count;
  run(kernels.backward_sums, kind);
}

// Every pass of dynamic thresholding over all samples, whole and in two parts.
void run_threshold(const StepCall& step) {
  ThresholdCall call;
  static_cast<Call&>(call) = step;
  static_cast<Shape&>(call) = step;
  call.x = step.x;
  call.out = step.out;
  call.max_value = 1.5;
  const int levels = call.x.dtype == DType::kFloat64 ? KeyOf<double>::kLevels : KeyOf<float>::kLevels;
  for (int64_t b = 0; b < call.batch; ++b) {
    const int64_t middle = call.sample / 2 + 1, ranges[][2] = {{0, call.sample}, {0, middle}, {middle, call.sample}};
    for (const auto& [first, last] : ranges) {
      ThresholdCounts counts;
      kernels.threshold_count(call, b, first, last, counts);
      for (int level = 0; level < levels; ++level) {
        ThresholdLevel search = {level, 0, {}, UINT64_MAX};
        kernels.threshold_search(call, b, first, last, search);
      }
      kernels.threshold_apply(call, b, first, last, 1.5);
    }
  }
}

void check(DType dtype, int64_t batch, int64_t size) {
  const int64_t bytes = batch * size * element_size(dtype), number = dtype == DType::kFloat64 ? 8 : 4;
  const Memory x(bytes), m(bytes), out(bytes), second(bytes), extra(bytes), scale(batch * number);
  const Memory written[5] = {Memory(bytes), Memory(bytes), Memory(bytes), Memory(bytes), Memory(bytes)};
  const Memory seeds(batch * 8), table(kColumns * number), t(batch * 8), t_to_row(3 * 8);
  const Memory distances(batch * leaves_of(size) * number), sums(batch * kSums * leaves_of(size) * number);

  NormalsCall normals;
  normals.out.data = out.data();
  normals.out.dtype = dtype;
  normals.seeds = seeds.as<int64_t>();
  normals.seeds_stride = 1;
  normals.batch = batch;
  normals.sample = size;
  run(kernels.normals, normals);

  const auto operand = [&](const Memory& memory) {
    Operand o = {};
    o.data = memory.data();
    o.dtype = dtype;
    o.batch_stride = size;
    return o;
  };
  StepCall call;
  call.x = operand(x);
  call.model_output = operand(m);
  call.out = operand(out);
  call.second = operand(second);
  call.table = table.data();
  call.table_rows = 1;
  call.seeds = normals.seeds;
  call.seeds_stride = 1;
  call.batch = batch;
  call.sample = size;
  call.flags = kDdpm;
  run(kernels.step, call);
  run_threshold(call);

  // The first timestep is in the chain. The others are beyond the map at either end, or lead to no row of the table.
  const int64_t told[] = {0, 3, -1, 1, 2, INT64_MAX, INT64_MIN}, rows_of_t[] = {0, -1, 1};
  for (int64_t b = 0; b < batch; ++b) t.as<int64_t>()[b] = told[b % 7];
  for (int k = 0; k < 3; ++k) t_to_row.as<int64_t>()[k] = rows_of_t[k];
  const Extras extras = {operand(extra), scale.data(), t.as<int64_t>(), t_to_row.as<int64_t>(), 3};
  run_kinds(call, extras);
  Operand gradients[5];
  for (int k = 0; k < 5; ++k) gradients[k] = operand(written[k]);
  BackwardCall backward = backward_of(call, extras.tensor, gradients);
  run_backward(backward, extras, gradients, normals.seeds);
  run_distance(call, extras, distances.data());
  run_sums(backward, extras, gradients, normals.seeds, sums.data(), scale.data());
  if (dtype == DType::kFloat16 || dtype == DType::kBFloat16) {
    StepCall rounded = call;
    rounded.flags |= kHostRounding;
    run(kernels.step, rounded);
    run_kinds(rounded, extras);
    backward.flags |= kHostRounding;
    run_backward(backward, extras, gradients, normals.seeds);
    run_distance(rounded, extras, distances.data());
    run_sums(backward, extras, gradients, normals.seeds, sums.data(), scale.data());
  }

  StepCall joined = call;
  joined.joined = size;
  joined.sample = batch * size;
  joined.batch = 1;
  run(kernels.step, joined);

  for (const int64_t rows : {2, 3, 4, 5, 9, 16, 31, 64, 65, 130}) {
    if (size % rows != 0 || size / rows < 2) continue;
    StepCall turned = call;
    Extras turned_extras = extras;
    turned.layout = Layout::kChannelsLast;
    turned.ndim = 2;
    turned.sizes[0] = rows;
    turned.sizes[1] = size / rows;
    for (Operand* o : {&turned.x, &turned.model_output, &turned.out, &turned.second, &turned_extras.tensor}) {
      o->strides[0] = 1;
      o->strides[1] = rows;
    }
    for (Operand& o : gradients) {
      o.strides[0] = 1;
      o.strides[1] = rows;
    }
    for (const Layout layout : {Layout::kChannelsLast, Layout::kStrided}) {
      turned.layout = layout;
      run(kernels.step, turned);
      if (batch != 2) continue;
      run_threshold(turned);
      run_kinds(turned, turned_extras);
      const BackwardCall back = backward_of(turned, turned_extras.tensor, gradients);
      run_backward(back, turned_extras, gradients, normals.seeds);
      // sums walk in logical order, all else in any
      const bool logical = layout == Layout::kStrided;
      run_distance(turned, turned_extras, logical ? distances.data() : nullptr);
      if (logical) run_sums(back, turned_extras, gradients, normals.seeds, sums.data(), scale.data());
    }
  }

  call.second.data = nullptr;
  run(kernels.step, call);
  call.seeds = nullptr;
  call.flags = kDdim;
  run(kernels.step, call);
  call.second = operand(second);
  run(kernels.step, call);
}

}  // namespace

int main() {
  for (const DType dtype : {DType::kFloat32, DType::kFloat64, DType::kFloat16, DType::kBFloat16}) {
    for (const int64_t batch : {1, 2, 17, 1000}) {
      for (const int64_t size :
           {1, 2, 3, 5, 7, 8, 31, 63, 64, 65, 130, 511, 513, 4095, 4097, 520 * 3, 600 * 16, 1040 * 65}) {
        if (batch * size <= 80000) check(dtype, batch, size);
      }
    }
  }
  puts("clean");
  return 0;
}
