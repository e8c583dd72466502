// Runs the kernels of one instruction set over exactly sized memory, in every layout and dtype and at the sizes where
// blocks, tiles and vectors end. Compiled with the address and undefined behaviour sanitizers, which end the program at
// the first byte read or written beyond its tensor; tests/test_sanitizers.py does that.
#include <cstdio>
#include <cstdlib>
#include <initializer_list>

#include "../csrc/step_cpu.h"

using namespace fastdiff;

namespace {

const Kernels& kernels = FASTDIFF_ISA::kKernels;
constexpr int kNoise = int(Variance::kFixed) << kVarianceShift | int(kDomainStep) << kDomainShift;
constexpr int kDdpm = kX0FromX | kClip | kHasA0 | kHasAx | kNoise;
constexpr int kDdim = kX0FromX | kClip | kHasA0 | kHasAe;

// Memory that ends where the tensor ends, filled with zeros.
class Memory {
 public:
  explicit Memory(int64_t bytes) : data_(static_cast<char*>(calloc(size_t(bytes), 1))) {}
  ~Memory() { free(data_); }
  Memory(const Memory&) = delete;
  char* data() const { return data_; }

 private:
  char* data_;
};

int64_t size_of(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

// Every unit by itself, as threads would run them.
template <class Call>
void run(void (*kernel)(const Call&, int64_t, int64_t), const Call& call) {
  for (int64_t unit = 0; unit < units_of(call); ++unit) kernel(call, unit, unit + 1);
}

void check(DType dtype, int64_t batch, int64_t size) {
  const int64_t bytes = batch * size * size_of(dtype);
  const Memory x(bytes), m(bytes), out(bytes), second(bytes), seeds(batch * 8), table(kColumns * 8);

  NormalsCall normals;
  normals.out.data = out.data();
  normals.out.dtype = dtype;
  normals.seeds = reinterpret_cast<const int64_t*>(seeds.data());
  normals.seeds_stride = 1;
  normals.batch = batch;
  normals.sample = size;
  run(kernels.normals, normals);

  StepCall call;
  Operand* const operands[] = {&call.x, &call.model_output, &call.out, &call.second};
  char* const data[] = {x.data(), m.data(), out.data(), second.data()};
  for (int k = 0; k < 4; ++k) {
    operands[k]->data = data[k];
    operands[k]->dtype = dtype;
    operands[k]->batch_stride = size;
  }
  call.table = table.data();
  call.table_rows = 1;
  call.seeds = normals.seeds;
  call.seeds_stride = 1;
  call.batch = batch;
  call.sample = size;
  call.flags = kDdpm;
  run(kernels.step, call);

  StepCall joined = call;
  joined.joined = size;
  joined.sample = batch * size;
  joined.batch = 1;
  run(kernels.step, joined);

  for (const int64_t rows : {2, 3, 4, 5, 9, 16, 31, 64, 65, 130}) {
    if (size % rows != 0 || size / rows < 2) continue;
    StepCall turned = call;
    turned.layout = Layout::kChannelsLast;
    turned.ndim = 2;
    turned.sizes[0] = rows;
    turned.sizes[1] = size / rows;
    for (Operand* o : {&turned.x, &turned.model_output, &turned.out, &turned.second}) {
      o->strides[0] = 1;
      o->strides[1] = rows;
    }
    run(kernels.step, turned);
    turned.layout = Layout::kStrided;
    run(kernels.step, turned);
  }

  call.seeds = nullptr;
  call.flags = kDdim;
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
