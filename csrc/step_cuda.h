// The kernels of a step on a GPU, over step.h and philox.h. No torch and no launch, so that they compile as plain C++
// too (tests/host_launch.h), which is how they are tested where there is no GPU; step_cuda.cu launches them.
//
// Every thread takes vectors of kVector elements of one sample: 16 bytes at a time where addresses allow, element by
// element elsewhere. Four elements are one Philox counter and two Box-Muller pairs, so nothing random is thrown away.
// The row, the timestep, the seeds and torch's generator state are read from device memory: the host never waits, and a
// captured launch serves every step.
#pragma once

#include "call.h"

#define FASTDIFF_DEVICE __device__ __forceinline__

namespace fastdiff {
namespace cuda {

constexpr int kThreads = 128;  // of a block; more would fit worse, many kernels having many registers

// What a kernel for contiguous operands is told: the operands of a StepCall without their strides.
struct FlatOperand {
  char* data;
  int64_t batch_stride;
  DType dtype;

  FlatOperand(const Operand& o) : data(o.data), batch_stride(o.batch_stride), dtype(o.dtype) {}
};

struct FlatStep : Call {
  FlatOperand out, second, x, model_output, learned, uncond, noise;

  explicit FlatStep(const StepCall& c)
      : Call(c),
        out(c.out),
        second(c.second),
        x(c.x),
        model_output(c.model_output),
        learned(c.learned),
        uncond(c.uncond),
        noise(c.noise) {}
};

struct FlatBackward : Call {
  FlatOperand grad_x, grad_model, grad_learned, grad_uncond, grad_noise;
  FlatOperand grad, grad_second, x, model_output, learned, uncond, noise;

  explicit FlatBackward(const BackwardCall& c)
      : Call(c),
        grad_x(c.grad_x),
        grad_model(c.grad_model),
        grad_learned(c.grad_learned),
        grad_uncond(c.grad_uncond),
        grad_noise(c.grad_noise),
        grad(c.grad),
        grad_second(c.grad_second),
        x(c.x),
        model_output(c.model_output),
        learned(c.learned),
        uncond(c.uncond),
        noise(c.noise) {}
};

// Where torch's own CUDA stream stands: values, or, in a captured graph, a buffer of seed and offset that is filled
// before each replay. threads: how many torch.randn would run for this many elements on this GPU; rounds: how often
// each draws.
struct TorchStream {
  uint64_t seed, offset;  // offset is added to that of the buffer
  const int64_t* state;   // [2] or null
  int64_t threads, rounds;
};

// Elements that a thread takes at a time: 16 bytes of the narrower operand, and at least a whole Philox counter.
template <class State, class Model>
constexpr int kVector = sizeof(typename State::Storage) == 2 || sizeof(typename Model::Storage) == 2 ? 8 : 4;

template <class Storage, int N>
struct alignas(N * sizeof(Storage) < 16 ? N * sizeof(Storage) : 16) Pack {
  Storage values[N];
};

template <class Storage, int N>
FASTDIFF_DEVICE void store_pack(const Pack<Storage, N>& pack, Storage* dst) {
#if defined(__CUDA_ARCH__)
  // Spelled out: where the compiler sees that elements are stored in another branch too, it makes both one, element by
  // element.
  constexpr int kWords = sizeof(pack) / 4;
  static_assert(kWords == 2 || (kWords > 0 && kWords % 4 == 0), "a pack is 8 bytes, or some times 16");
  uint32_t words[kWords];
  memcpy(words, &pack, sizeof(pack));
  const size_t address = __cvta_generic_to_global(dst);
  if constexpr (kWords == 2) {
    asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(address), "r"(words[0]), "r"(words[1]) : "memory");
  } else {
    FASTDIFF_UNROLL
    for (int i = 0; i < kWords; i += 4) {
      asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(address + 4 * i), "r"(words[i]), "r"(words[i + 1]),
                   "r"(words[i + 2]), "r"(words[i + 3])
                   : "memory");
    }
  }
#else
  *reinterpret_cast<Pack<Storage, N>*>(dst) = pack;
#endif
}

// Part of an operand: `whole` elements of a vector at an aligned address, or the first `count` of them at any.
struct Extent {
  int64_t first;
  int count;
  bool whole;
};

template <class Format, int N, class T>
FASTDIFF_DEVICE void load(T (&dst)[N], const char* data, const Extent& at) {
  using Storage = typename Format::Storage;
  const Storage* const src = reinterpret_cast<const Storage*>(data) + at.first;
  if (at.whole) {
    const auto pack = *reinterpret_cast<const Pack<Storage, N>*>(src);
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) dst[i] = T(Format::load(pack.values[i]));
  } else {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) dst[i] = i < at.count ? T(Format::load(src[i])) : T(0);
  }
}

template <class Format, int N, class T>
FASTDIFF_DEVICE void store(const T (&src)[N], char* data, const Extent& at) {
  using Storage = typename Format::Storage;
  Storage* const dst = reinterpret_cast<Storage*>(data) + at.first;
  if constexpr (N == 1) {
    dst[0] = Format::store(src[0]);
  } else if (at.whole) {
    Pack<Storage, N> pack;
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) pack.values[i] = Format::store(src[i]);
    store_pack(pack, dst);
  } else {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) {
      if (i < at.count) dst[i] = Format::store(src[i]);
    }
  }
}

// For operands whose dtype is known at run time only: the noise, and all those of strided kernels. checks.h lets
// float64 stand beside float64 alone.
template <int N, class T>
FASTDIFF_DEVICE void load_any(T (&dst)[N], DType dtype, const char* data, const Extent& at) {
  switch (dtype) {
    case DType::kFloat16: return load<Float16>(dst, data, at);
    case DType::kBFloat16: return load<BFloat16>(dst, data, at);
    case DType::kFloat64:
      if constexpr (sizeof(T) == sizeof(double)) load<Float64>(dst, data, at);
      return;
    case DType::kFloat32: return load<Float32>(dst, data, at);
  }
}

template <int N, class T>
FASTDIFF_DEVICE void store_any(const T (&src)[N], DType dtype, char* data, const Extent& at) {
  switch (dtype) {
    case DType::kFloat16: return store<Float16>(src, data, at);
    case DType::kBFloat16: return store<BFloat16>(src, data, at);
    case DType::kFloat64:
      if constexpr (sizeof(T) == sizeof(double)) store<Float64>(src, data, at);
      return;
    case DType::kFloat32: return store<Float32>(src, data, at);
  }
}

template <int N, class T>
FASTDIFF_DEVICE void normals(T (&z)[N], uint32_t counter, const Stream& s) {
  FASTDIFF_UNROLL
  for (int g = 0; g < N; g += 4) {
    uint32_t words[4] = {counter + uint32_t(g / 4), s.t, s.domain, s.repeat};
    philox4x32_10(words, s.seed);
    float four[4];
    box_muller(words[0], words[1], four[0], four[1]);
    box_muller(words[2], words[3], four[2], four[3]);
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) z[g + i] = T(four[i]);
  }
}

// One sample of a call: its row, scale and seed.
template <class T>
struct Sample {
  Row<T> row;
  T scale;
  Stream stream;
  bool valid;

  FASTDIFF_DEVICE Sample(const Call& call, DType state, int64_t b) {
    const int64_t index = find_row(call, b);
    valid = index >= 0;
    if (!valid) return;
    const T* const columns = static_cast<const T*>(call.table) + index * kColumns;
    with_rounding<T>(state, call.flags, [&](auto rnd) { row = load_row(columns, call.flags, rnd); });
    if (call.scale != nullptr) scale = static_cast<const T*>(call.scale)[b * call.scale_stride];
    stream.seed = call.seeds != nullptr ? uint64_t(call.seeds[b * call.seeds_stride]) : 0;
    stream.t = row.t;
    stream.domain = uint32_t((call.flags >> kDomainShift) & 3);
    stream.repeat = row.repeat;
  }
};

// The terms that our own samplers have: a kernel for these alone has no division and fewer registers. DDPM and DDIM,
// with clip and without, have loops of their own in the kernels for plain calls.
constexpr int kTerms =
    kX0FromX | kX0Divide | kClip | kEpsRederived | kEpsLinear | kEpsDivide | kHasA0 | kHasAx | kHasAe;
constexpr int kCommonTerms = kX0FromX | kClip | kHasA0 | kHasAx | kHasAe;
constexpr int kDdpm = kX0FromX | kHasA0 | kHasAx;
constexpr int kDdim = kX0FromX | kHasA0 | kHasAe;

// Which calls a kernel is for.
enum class Scope {
  kPlain,   // DDPM or DDIM; x, a model output and a result; no noise or that of seeds
  kCommon,  // kCommonTerms; also guidance, x0 and a noise tensor of x's dtype
  kAny,
};

FASTDIFF_HD bool has_plain_terms(int flags) {
  const int terms = flags & kTerms & ~kClip;
  return terms == kDdpm || terms == kDdim;
}

// Calls fn with the terms of a plain call, known to the compiler.
template <class Fn>
FASTDIFF_DEVICE void with_plain_terms(int flags, Fn fn) {
  switch (flags & kTerms) {
    case kDdpm: return fn(StaticFlags<kDdpm>{});
    case kDdpm | kClip: return fn(StaticFlags<kDdpm | kClip>{});
    case kDdim: return fn(StaticFlags<kDdim>{});
    case kDdim | kClip: return fn(StaticFlags<kDdim | kClip>{});
  }
}

// The whole step of N elements, from loaded operands to the two outputs. learned, uncond: as loaded, where the call has
// them; z: the noise, overwritten.
template <bool kAny, int N, class T, class Round>
FASTDIFF_DEVICE void step_vector(const Row<T>& row, T scale, int flags, Round rnd, bool has_uncond, const T (&x)[N],
                                 T (&m)[N], const T (&learned)[N], const T (&uncond)[N], T (&z)[N], T (&out)[N],
                                 T (&second)[N]) {
  if (has_uncond) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) m[i] = guide(rnd, m[i], uncond[i], scale);
  }
  const Variance variance = variance_of(flags);
  const Second kind = kAny ? second_of(flags) : Second::kX0;
  T target[N] = {};
  if (kind == Second::kNoise) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) target[i] = z[i];
  } else if (kind == Second::kVelocity) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) target[i] = rnd(rnd(row.ax * rnd(z[i])) - rnd(row.s * x[i]));
  }
  if (kAny && is_learned(variance)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) z[i] = rnd(learned_scale(row, variance, rnd, learned[i]) * rnd(z[i]));
  } else if (variance == Variance::kFixed) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) z[i] = rnd(row.s * rnd(z[i]));
  }
  const SomeFlags<kAny ? ~0 : kCommonTerms> terms = {flags};
  step_elements(row, terms, rnd, variance != Variance::kNone, x, m, z, out, second);
  if (kind != Second::kX0) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) second[i] = target[i];
  }
}

template <int N, class T>
FASTDIFF_DEVICE void fill(T (&dst)[N], T value) {
  FASTDIFF_UNROLL
  for (int i = 0; i < N; ++i) dst[i] = value;
}

// The address of sample b of an operand; null for one that the call lacks.
template <class Format>
FASTDIFF_DEVICE char* at(const FlatOperand& o, int64_t b) {
  return o.data == nullptr ? nullptr : o.data + b * o.batch_stride * int64_t(sizeof(typename Format::Storage));
}

FASTDIFF_DEVICE char* at_any(const FlatOperand& o, int64_t b) {
  return o.data == nullptr ? nullptr : o.data + b * o.batch_stride * element_size(o.dtype);
}

template <int N>
FASTDIFF_DEVICE Extent extent_of(int64_t first, int64_t elements, bool aligned) {
  const int64_t left = elements - first;
  return {first, left < N ? int(left) : N, aligned && left >= N};
}

// The operands of one sample of contiguous memory.
template <class State, class Model, int N = kVector<State, Model>>
struct FlatSample {
  using T = Compute<State>;
  const char *x, *model_output, *learned, *uncond, *noise;
  char *out, *second;
  bool aligned;

  FASTDIFF_DEVICE FlatSample(const FlatStep& c, int64_t b) {
    x = at<State>(c.x, b);
    model_output = at<Model>(c.model_output, b);
    learned = at<Model>(c.learned, b);
    uncond = at<Model>(c.uncond, b);
    noise = at_any(c.noise, b);
    out = at<State>(c.out, b);
    second = at<State>(c.second, b);
    // the addresses of absent operands are 0 and fit everywhere
    const uintptr_t bits = uintptr_t(x) | uintptr_t(model_output) | uintptr_t(learned) | uintptr_t(uncond) |
                           uintptr_t(noise) | uintptr_t(out) | uintptr_t(second);
    aligned = bits % 16 == 0;
  }

  FASTDIFF_DEVICE Extent extent(int64_t first, int64_t elements) const {
    return extent_of<N>(first, elements, aligned);
  }

  // A step of Scope::kPlain. z: the noise, overwritten.
  template <bool kNoise, class Terms>
  FASTDIFF_DEVICE void plain_step(Terms terms, const Sample<T>& s, const Extent& e, T (&z)[N]) const {
    T vx[N], vm[N], vout[N], x0[N];
    load<State>(vx, x, e);
    load<Model>(vm, model_output, e);
    if (kNoise) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) z[i] = s.row.s * z[i];
    }
    step_elements(s.row, terms, KeepPrecision{}, kNoise, vx, vm, z, vout, x0);
    if (!s.valid) fill(vout, T(__builtin_nanf("")));
    store<State>(vout, out, e);
  }

  // Each part of a step where the call has it. z: the noise, where the caller has made it.
  template <bool kAny>
  FASTDIFF_DEVICE void step(const FlatStep& c, const Sample<T>& s, const Extent& e, T (&z)[N]) const {
    T vx[N], vm[N], vlearned[N], vuncond[N], vout[N], vsecond[N];
    if (s.valid) {
      load<State>(vx, x, e);
      if (model_output != nullptr) {
        load<Model>(vm, model_output, e);
      } else {
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) vm[i] = vx[i];  // a structure without x0 and eps never looks at it
      }
      if (kAny && learned != nullptr) load<Model>(vlearned, learned, e);
      if (uncond != nullptr) load<Model>(vuncond, uncond, e);
      if (noise != nullptr) load_any(z, kAny ? c.noise.dtype : State::kDType, noise, e);
      with_rounding<T>(kAny ? State::kDType : DType::kFloat32, c.flags, [&](auto rnd) {
        step_vector<kAny>(s.row, s.scale, c.flags, rnd, uncond != nullptr, vx, vm, vlearned, vuncond, z, vout, vsecond);
      });
    } else {
      fill(vout, T(__builtin_nanf("")));
      fill(vsecond, T(__builtin_nanf("")));
    }
    store<State>(vout, out, e);
    if (second != nullptr) store<State>(vsecond, second, e);
  }
};

// The loops of a thread: over the samples, and over the vectors of `width` elements of one.
template <class Fn>
FASTDIFF_DEVICE void for_each_sample(int64_t batch, Fn fn) {
  const int64_t step = int64_t(gridDim.y) * blockDim.y;
  for (int64_t b = int64_t(blockIdx.y) * blockDim.y + threadIdx.y; b < batch; b += step) fn(b);
}

template <class Fn>
FASTDIFF_DEVICE void for_each_vector(int64_t elements, int width, Fn fn) {
  const int64_t step = int64_t(gridDim.x) * blockDim.x * width;
  for (int64_t i = (int64_t(blockIdx.x) * blockDim.x + threadIdx.x) * width; i < elements; i += step) fn(i);
}

// A step of contiguous operands. kSeeds: whether a plain step has noise.
template <class State, class Model, Scope kScope, bool kSeeds = false>
__global__ void __launch_bounds__(kThreads, kScope == Scope::kPlain ? 5 : 3)
    step_flat(const __grid_constant__ FlatStep c) {
  using T = Compute<State>;
  constexpr int N = kVector<State, Model>;
  for_each_sample(c.batch, [&](int64_t b) {
    const Sample<T> s(c, State::kDType, b);
    const FlatSample<State, Model> o(c, b);
    if constexpr (kScope == Scope::kPlain) {
      with_plain_terms(c.flags, [&](auto terms) {
        for_each_vector(c.sample, N, [&](int64_t i) {
          T z[N];
          if (kSeeds) normals(z, uint32_t(i / 4), s.stream);
          o.template plain_step<kSeeds>(terms, s, o.extent(i, c.sample), z);
        });
      });
    } else {
      for_each_vector(c.sample, N, [&](int64_t i) {
        T z[N];
        if (c.seeds != nullptr) normals(z, uint32_t(i / 4), s.stream);
        o.template step<kScope == Scope::kAny>(c, s, o.extent(i, c.sample), z);
      });
    }
  });
}

// torch's CUDA normals: curand_normal4 of subsequence `thread` at offset 4*`offset` (cuRAND's Philox4x32-10 and its
// Box-Muller with the accurate logarithm and the fast sine and cosine).
FASTDIFF_DEVICE void torch_normals(float (&z)[4], uint64_t seed, uint64_t offset, uint32_t thread) {
  uint32_t words[4] = {uint32_t(offset), uint32_t(offset >> 32), thread, 0};
  philox4x32_10(words, seed);
  constexpr float kTurn = 2.3283064e-10f * 6.2831855f;
  FASTDIFF_UNROLL
  for (int k = 0; k < 4; k += 2) {
    const float u = fma_exact(static_cast<float>(words[k]), 0x1p-32f, 0x1p-33f);
    const float angle = fma_exact(static_cast<float>(words[k + 1]), kTurn, kTurn / 2);
    const float radius = sqrt_exact(-2.0f * logf(u));
    float sine, cosine;
    __sincosf(angle, &sine, &cosine);
    z[k] = sine * radius;
    z[k + 1] = cosine * radius;
  }
}

// Elements that a thread takes at a time where it draws as torch does, four times as many for each vector.
constexpr int kTorchVector = 4;

// A step of contiguous operands in logical order, with the noise that torch.randn would have given for the whole batch
// in x's dtype. Of torch's threads, thread i makes elements i + threads*(4*j + k), k = 0 to 3, in its round j:
// neighbours make four vectors. For kPlain the batch is one sample; else a sample is a multiple of four elements, or
// the only one.
template <class State, class Model, Scope kScope>
__global__ void __launch_bounds__(kThreads, kScope == Scope::kPlain ? 6 : 4)
    step_torch(const __grid_constant__ FlatStep c, TorchStream stream) {
  using T = Compute<State>;
  constexpr int N = kTorchVector;
  if (stream.state != nullptr) {
    stream.seed = uint64_t(stream.state[0]);
    stream.offset += uint64_t(stream.state[1]);
  }
  const int64_t total = c.batch * c.sample, threads = stream.threads;
  int64_t entered = 0;
  Sample<T> s(c, State::kDType, 0);
  FlatSample<State, Model, N> o(c, 0);
  const auto draw = [&](int64_t round, int64_t thread, auto step) {
    const int64_t first = 4 * threads * round + thread;
    if (first >= total) return;
    float drawn[N][4];
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) {
      torch_normals(drawn[i], stream.seed, stream.offset / 4 + uint64_t(round), uint32_t(thread + i));
    }
    FASTDIFF_UNROLL
    for (int k = 0; k < 4; ++k) {
      T z[N];
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) z[i] = State::load(State::store(drawn[i][k]));
      if (first + k * threads < total) step(first + k * threads, z);
    }
  };
  if constexpr (kScope == Scope::kPlain) {
    with_plain_terms(c.flags, [&](auto terms) {
      for_each_sample(stream.rounds, [&](int64_t round) {
        for_each_vector(threads, N, [&](int64_t thread) {
          draw(round, thread,
               [&](int64_t at, T(&z)[N]) { o.template plain_step<true>(terms, s, o.extent(at, total), z); });
        });
      });
    });
  } else {
    for_each_sample(stream.rounds, [&](int64_t round) {
      for_each_vector(threads, N, [&](int64_t thread) {
        draw(round, thread, [&](int64_t at, T(&z)[N]) {
          const int64_t b = c.batch == 1 ? 0 : at / c.sample;
          if (b != entered) {
            entered = b;
            s = Sample<T>(c, State::kDType, b);
            o = FlatSample<State, Model, N>(c, b);
          }
          o.template step<true>(c, s, o.extent(at - b * c.sample, c.sample), z);
        });
      });
    });
  }
}

// The normals of a whole batch, contiguous.
template <class Format>
__global__ void __launch_bounds__(kThreads) normals_flat(const __grid_constant__ NormalsCall c) {
  constexpr int N = kVector<Format, Format>;
  for_each_sample(c.batch, [&](int64_t b) {
    const Stream stream = {uint64_t(c.seeds[b * c.seeds_stride]), c.t, c.domain, c.repeat};
    char* const out = c.out.data + b * c.sample * int64_t(sizeof(typename Format::Storage));
    const bool aligned = uintptr_t(out) % 16 == 0;
    for_each_vector(c.sample, N, [&](int64_t i) {
      Compute<Format> z[N];
      normals(z, uint32_t(i / 4), stream);
      store<Format>(z, out, extent_of<N>(i, c.sample, aligned));
    });
  });
}

template <class T>
FASTDIFF_DEVICE T load_one(const Operand& o, int64_t at) {
  T value[1] = {};
  load_any(value, o.dtype, o.data, {at, 1, false});
  return value[0];
}

template <class T>
FASTDIFF_DEVICE void store_one(const Operand& o, int64_t at, T value) {
  const T values[1] = {value};
  store_any(values, o.dtype, o.data, {at, 1, false});
}

// How the threads of a strided call share a sample: four elements that follow one another in logical order, one Philox
// counter, at a time. In channels-last memory neighbouring threads take neighbouring channels, so that what a warp
// reads lies together.
template <class Index>
struct Walk {
  Index counters, channels;

  FASTDIFF_DEVICE Walk(const Shape& shape, int64_t sample) : counters(Index((sample + 3) / 4)), channels(0) {
    if (shape.layout == Layout::kChannelsLast && shape.sizes[1] % 4 == 0) channels = Index(shape.sizes[0]);
  }

  FASTDIFF_DEVICE Index counter(Index q) const {
    if (channels == 0) return q;
    const Index group = q / channels;
    return (q - group * channels) * (counters / channels) + group;
  }
};

// Where element `index` of sample b, in logical order, lies in each operand.
template <class Index, int K>
FASTDIFF_DEVICE void locate(const Shape& shape, Index index, int64_t b, const Operand* const (&operands)[K],
                            int64_t (&at)[K]) {
  FASTDIFF_UNROLL
  for (int k = 0; k < K; ++k) at[k] = b * operands[k]->batch_stride;
  for (int d = shape.ndim - 1; d >= 0; --d) {
    const Index size = Index(shape.sizes[d]), outer = index / size;
    const int64_t along = int64_t(index - outer * size);
    index = outer;
    FASTDIFF_UNROLL
    for (int k = 0; k < K; ++k) at[k] += along * operands[k]->strides[d];
  }
}

// An index known at run time would put the array in local memory.
template <class T>
FASTDIFF_DEVICE T pick(const T (&four)[4], int i) {
  return i == 0 ? four[0] : i == 1 ? four[1] : i == 2 ? four[2] : four[3];
}

// Any step, of operands that lie in memory in any way.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(double) ? 3 : 5)
    step_strided(const __grid_constant__ StepCall c) {
  const Operand* const operands[] = {&c.x, &c.model_output, &c.learned, &c.uncond, &c.noise, &c.out, &c.second};
  const Walk<Index> walk(c, c.sample);
  for_each_sample(c.batch, [&](int64_t b) {
    const Sample<T> s(c, c.x.dtype, b);
    for_each_vector(walk.counters, 1, [&](int64_t q) {
      const Index counter = walk.counter(Index(q));
      T made[4] = {};
      if (c.seeds != nullptr) normals(made, uint32_t(counter), s.stream);
      FASTDIFF_ROLLED
      for (int i = 0; i < 4; ++i) {
        const Index index = 4 * counter + Index(i);
        if (int64_t(index) >= c.sample) break;
        int64_t at[7];
        locate(c, index, b, operands, at);
        T x[1], m[1], learned[1], uncond[1], z[1], out[1], second[1];
        if (s.valid) {
          x[0] = load_one<T>(c.x, at[0]);
          m[0] = c.model_output.data != nullptr ? load_one<T>(c.model_output, at[1]) : x[0];
          if (c.learned.data != nullptr) learned[0] = load_one<T>(c.learned, at[2]);
          if (c.uncond.data != nullptr) uncond[0] = load_one<T>(c.uncond, at[3]);
          z[0] = pick(made, i);
          if (c.noise.data != nullptr) z[0] = load_one<T>(c.noise, at[4]);
          with_rounding<T>(c.x.dtype, c.flags, [&](auto rnd) {
            step_vector<true>(s.row, s.scale, c.flags, rnd, c.uncond.data != nullptr, x, m, learned, uncond, z, out,
                              second);
          });
        } else {
          fill(out, T(__builtin_nanf("")));
          fill(second, T(__builtin_nanf("")));
        }
        store_one(c.out, at[5], out[0]);
        if (c.second.data != nullptr) store_one(c.second, at[6], second[0]);
      }
    });
  });
}

// The gradients of N elements, from loaded operands. mu: of uncond_output on entry, its gradient on return. extras: as
// for step_backward_elements.
template <int N, class T, class Call, class Round, class Extras>
FASTDIFF_DEVICE void backward_vector(const Sample<T>& s, const Call& c, Round rnd, const T (&g)[N], const T (&h)[N],
                                     const T (&x)[N], T (&m)[N], const T (&v)[N], const T (&z)[N], T (&mu)[N],
                                     T (&dx)[N], T (&dm)[N], T (&dv)[N], T (&dz)[N], Extras& extras) {
  [[maybe_unused]] T apart[N];  // the two model outputs
  if (c.uncond.data != nullptr) {
    if constexpr (Extras::kTerms) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) apart[i] = rnd(m[i] - mu[i]);
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) m[i] = guide(rnd, m[i], mu[i], s.scale);
  }
  step_backward_elements(s.row, RuntimeFlags{c.flags}, rnd, c.grad.data != nullptr, c.grad_second.data != nullptr, g, h,
                         x, m, v, z, dx, dm, dv, dz, extras);
  if constexpr (Extras::kTerms) {
    if (c.uncond.data != nullptr) add_products(extras, kGuidance, dm, apart);
  }
  if (c.scale != nullptr) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) guide_backward(s.scale, dm[i], dm[i], mu[i]);
  }
}

// The backward of a step, of contiguous operands.
template <class State, class Model>
__global__ void __launch_bounds__(kThreads) backward_flat(const __grid_constant__ FlatBackward c) {
  using T = Compute<State>;
  constexpr int N = kVector<State, Model>;
  for_each_sample(c.batch, [&](int64_t b) {
    const Sample<T> s(c, State::kDType, b);
    const char *const grad = at<State>(c.grad, b), *const grad_second = at<State>(c.grad_second, b);
    const char *const x = at<State>(c.x, b), *const model_output = at<Model>(c.model_output, b);
    const char *const learned = at<Model>(c.learned, b), *const uncond = at<Model>(c.uncond, b);
    const char* const noise = at_any(c.noise, b);
    char *const grad_x = at<State>(c.grad_x, b), *const grad_model = at<Model>(c.grad_model, b);
    char *const grad_learned = at<Model>(c.grad_learned, b), *const grad_uncond = at<Model>(c.grad_uncond, b);
    char* const grad_noise = at_any(c.grad_noise, b);
    uintptr_t bits = 0;
    for (const char* address : {grad, grad_second, x, model_output, learned, uncond, noise}) bits |= uintptr_t(address);
    for (char* address : {grad_x, grad_model, grad_learned, grad_uncond, grad_noise}) bits |= uintptr_t(address);
    const bool aligned = bits % 16 == 0;
    for_each_vector(c.sample, N, [&](int64_t i) {
      const Extent e = extent_of<N>(i, c.sample, aligned);
      T g[N] = {}, h[N] = {}, vx[N] = {}, m[N] = {}, v[N] = {}, z[N] = {}, mu[N] = {};
      T dx[N] = {}, dm[N] = {}, dv[N] = {}, dz[N] = {};
      if (s.valid) {
        if (grad != nullptr) load<State>(g, grad, e);
        if (grad_second != nullptr) load<State>(h, grad_second, e);
        if (x != nullptr) load<State>(vx, x, e);
        if (model_output != nullptr) load<Model>(m, model_output, e);
        if (learned != nullptr) load<Model>(v, learned, e);
        if (uncond != nullptr) load<Model>(mu, uncond, e);
        if (noise != nullptr) load_any(z, c.noise.dtype, noise, e);
        if (c.seeds != nullptr) normals(z, uint32_t(i / 4), s.stream);
        NoExtras none;
        with_rounding<T>(State::kDType, c.flags,
                         [&](auto rnd) { backward_vector(s, c, rnd, g, h, vx, m, v, z, mu, dx, dm, dv, dz, none); });
      }
      if (grad_x != nullptr) store<State>(dx, grad_x, e);
      if (grad_model != nullptr) store<Model>(dm, grad_model, e);
      if (grad_learned != nullptr) store<Model>(dv, grad_learned, e);
      if (grad_uncond != nullptr) store<Model>(mu, grad_uncond, e);
      if (grad_noise != nullptr) store_any(dz, c.grad_noise.dtype, grad_noise, e);
    });
  });
}

// The backward of a step, of operands that lie in memory in any way.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads, 3) backward_strided(const __grid_constant__ BackwardCall c) {
  const Operand* const inputs[] = {&c.grad, &c.grad_second, &c.x, &c.model_output, &c.learned, &c.uncond, &c.noise};
  const Operand* const outputs[] = {&c.grad_x, &c.grad_model, &c.grad_learned, &c.grad_uncond, &c.grad_noise};
  const Walk<Index> walk(c, c.sample);
  for_each_sample(c.batch, [&](int64_t b) {
    const Sample<T> s(c, c.state, b);
    for_each_vector(walk.counters, 1, [&](int64_t q) {
      const Index counter = walk.counter(Index(q));
      T made[4] = {};
      if (c.seeds != nullptr) normals(made, uint32_t(counter), s.stream);
      FASTDIFF_ROLLED
      for (int i = 0; i < 4; ++i) {
        const Index index = 4 * counter + Index(i);
        if (int64_t(index) >= c.sample) break;
        int64_t from[7], to[5];
        locate(c, index, b, inputs, from);
        locate(c, index, b, outputs, to);
        T in[7][1] = {}, dx[1] = {}, dm[1] = {}, dv[1] = {}, dz[1] = {};
        if (s.valid) {
          FASTDIFF_UNROLL
          for (int k = 0; k < 7; ++k) {
            if (inputs[k]->data != nullptr) in[k][0] = load_one<T>(*inputs[k], from[k]);
          }
          if (c.seeds != nullptr) in[6][0] = pick(made, i);
          NoExtras none;
          with_rounding<T>(c.state, c.flags, [&](auto rnd) {
            backward_vector(s, c, rnd, in[0], in[1], in[2], in[3], in[4], in[6], in[5], dx, dm, dv, dz, none);
          });
        }
        const T gradients[5] = {dx[0], dm[0], dv[0], in[5][0], dz[0]};
        FASTDIFF_UNROLL
        for (int k = 0; k < 5; ++k) {
          if (outputs[k]->data != nullptr) store_one(*outputs[k], to[k], gradients[k]);
        }
      }
    });
  });
}

// Sums over samples. A block takes a leaf, each of its threads four elements that follow one another in logical order,
// one Philox counter; what comes of the leaves of a row is summed in the same way until one number is left.
static_assert(kLeaf == 4 * kThreads && kThreads == 4 * 32, "the trees of a thread, a warp and a block make one");

// The loops of a block, whose threads stay together: over rows, and over the leaves of one.
template <class Fn>
FASTDIFF_DEVICE void for_each_leaf(int64_t rows, int64_t leaves, Fn fn) {
  for (int64_t r = blockIdx.y; r < rows; r += gridDim.y) {
    for (int64_t leaf = blockIdx.x; leaf < leaves; leaf += gridDim.x) fn(r, leaf);
  }
}

// The tree over what the threads of a block have of K sums: to[k * stride].
template <int K, class T>
FASTDIFF_DEVICE void sum_block(T (&values)[K], T* to, int64_t stride) {
  __shared__ T of_warps[4][K];
  FASTDIFF_UNROLL
  for (int k = 0; k < K; ++k) {
    FASTDIFF_UNROLL
    for (int lane = 1; lane < 32; lane *= 2) values[k] = values[k] + __shfl_xor_sync(0xFFFFFFFFu, values[k], lane);
  }
  if (threadIdx.x % 32 == 0) {
    FASTDIFF_UNROLL
    for (int k = 0; k < K; ++k) of_warps[threadIdx.x / 32][k] = values[k];
  }
  __syncthreads();
  const int k = int(threadIdx.x);
  if (k < K) to[k * stride] = (of_warps[0][k] + of_warps[1][k]) + (of_warps[2][k] + of_warps[3][k]);
  __syncthreads();  // the next leaf is not to overtake
}

// rows of n numbers each, to the sums of their leaves.
template <class T>
__global__ void __launch_bounds__(kThreads) fold_sums(const T* from, int64_t n, int64_t rows, T* to) {
  const int64_t leaves = leaves_of(n);
  for_each_leaf(rows, leaves, [&](int64_t r, int64_t leaf) {
    const int64_t first = leaf * kLeaf + 4 * int64_t(threadIdx.x);
    T four[4];
    FASTDIFF_UNROLL
    for (int i = 0; i < 4; ++i) four[i] = first + i < n ? from[r * n + first + i] : T(0);
    T sum[1] = {(four[0] + four[1]) + (four[2] + four[3])};
    sum_block(sum, to + r * leaves + leaf, 1);
  });
}

// The tree over four elements of a thread, for K sums, as they come one after another.
template <int K, class T>
struct FourSums {
  T first[K] = {}, second[K] = {};  // pairs

  FASTDIFF_DEVICE void add(int i, int k, T value) {
    if (i == 2) first[k] = second[k];
    second[k] = i % 2 == 0 ? value : second[k] + value;
  }

  FASTDIFF_DEVICE void finish(int count) {
    FASTDIFF_UNROLL
    for (int k = 0; k < K; ++k) second[k] = count > 2 ? first[k] + second[k] : second[k];
  }
};

// A value as a state of this dtype holds it.
template <class T>
FASTDIFF_DEVICE T rounded(DType state, T value) {
  if constexpr (sizeof(T) == sizeof(float)) {
    if (state == DType::kFloat16) return Float16::load(Float16::store(value));
    if (state == DType::kBFloat16) return BFloat16::load(BFloat16::store(value));
  }
  return value;
}

// A step, or one that was done, and the squares of its deviations from the mean, of operands that lie in any way.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads, sizeof(T) == sizeof(double) ? 3 : 5)
    step_distance(const __grid_constant__ DistanceCall c, T min_std) {
  const Operand* const operands[] = {&c.x, &c.model_output, &c.uncond, &c.noise, &c.x_prev, &c.out, &c.squares};
  const int64_t leaves = leaves_of(c.sample);
  for_each_leaf(c.batch, leaves, [&](int64_t b, int64_t leaf) {
    const Sample<T> s(c, c.x.dtype, b);
    const Index counter = Index(leaf) * kThreads + threadIdx.x;
    T made[4] = {};
    if (c.seeds != nullptr) normals(made, uint32_t(counter), s.stream);
    T four[4] = {};
    FASTDIFF_ROLLED
    for (int i = 0; i < 4; ++i) {
      const Index index = 4 * counter + Index(i);
      if (int64_t(index) >= c.sample) break;
      int64_t at[7];
      locate(c, index, b, operands, at);
      T x_prev = T(__builtin_nanf("")), square = x_prev;
      if (s.valid) {
        const T x[1] = {load_one<T>(c.x, at[0])};
        T m[1] = {c.model_output.data != nullptr ? load_one<T>(c.model_output, at[1]) : x[0]};
        T z = c.noise.data != nullptr ? load_one<T>(c.noise, at[3]) : pick(made, i);
        T mean[1], x0[1];
        with_rounding<T>(c.x.dtype, c.flags, [&](auto rnd) {
          if (c.uncond.data != nullptr) m[0] = guide(rnd, m[0], load_one<T>(c.uncond, at[2]), s.scale);
          step_elements(s.row, RuntimeFlags{c.flags}, rnd, false, x, m, x, mean, x0);
          z = rnd(mean[0] + rnd(s.row.s * rnd(z)));
        });
        x_prev = c.out.data != nullptr ? rounded(c.x.dtype, z) : load_one<T>(c.x_prev, at[4]);
        const T away = deviation(x_prev, mean[0], at_least(s.row.s, min_std));
        square = away * away;
      }
      if (c.out.data != nullptr) store_one(c.out, at[5], x_prev);
      if (c.squares.data != nullptr) store_one(c.squares, at[6], square);
      FASTDIFF_UNROLL
      for (int k = 0; k < 4; ++k) four[k] = k == i ? square : four[k];
    }
    T sum[1] = {(four[0] + four[1]) + (four[2] + four[3])};
    if (c.sums != nullptr) sum_block(sum, static_cast<T*>(c.sums) + b * leaves + leaf, 1);
  });
}

// What the kernel below is told of a SumsCall. No learned variance has a distance, and no other one a variance half:
// the operands of the two share their places, for a kernel's parameters are 4096 bytes at most.
struct PackedSums : Call, Shape {
  Operand grad, grad_second, x, model_output, learned_or_x_prev, uncond, noise;
  Operand grad_x, grad_model, grad_learned_or_squares, grad_uncond, grad_noise;
  DType state;
  const void* grad_distance;
  int64_t grad_distance_stride;
  void* sums;
  bool learned, has_distance;

  explicit PackedSums(const SumsCall& c)
      : Call(c),
        Shape(c),
        grad(c.grad),
        grad_second(c.grad_second),
        x(c.x),
        model_output(c.model_output),
        learned_or_x_prev(is_learned(variance_of(c.flags)) ? c.learned : c.x_prev),
        uncond(c.uncond),
        noise(c.noise),
        grad_x(c.grad_x),
        grad_model(c.grad_model),
        grad_learned_or_squares(is_learned(variance_of(c.flags)) ? c.grad_learned : c.grad_squares),
        grad_uncond(c.grad_uncond),
        grad_noise(c.grad_noise),
        state(c.state),
        grad_distance(c.grad_distance),
        grad_distance_stride(c.grad_distance_stride),
        sums(c.sums),
        learned(is_learned(variance_of(c.flags))),
        has_distance(fastdiff::has_distance(c)) {}
};

template <class T>
struct ThreadExtras {
  static constexpr bool kDistance = true, kTerms = true;
  bool has_distance;
  T min_std, x_prev[1], grad_squares[1];
  int element;  // of the thread's four
  FourSums<kSums, T> sums;

  FASTDIFF_DEVICE void add(int column, const T (&terms)[1]) { sums.add(element, column, terms[0]); }
};

// The backward of a step that has the gradient of a distance, or sums, of operands that lie in any way.
template <class T, class Index>
__global__ void __launch_bounds__(kThreads, 2) backward_sums(const __grid_constant__ PackedSums c, T min_std) {
  const Operand* const inputs[] = {&c.grad,   &c.grad_second, &c.x, &c.model_output, &c.learned_or_x_prev,
                                   &c.uncond, &c.noise};
  const Operand* const outputs[] = {&c.grad_x, &c.grad_model, &c.grad_learned_or_squares, &c.grad_uncond,
                                    &c.grad_noise};
  const int64_t leaves = leaves_of(c.sample);
  for_each_leaf(c.batch, leaves, [&](int64_t b, int64_t leaf) {
    const Sample<T> s(c, c.state, b);
    const Index counter = Index(leaf) * kThreads + threadIdx.x;
    T made[4] = {};
    if (c.seeds != nullptr) normals(made, uint32_t(counter), s.stream);
    ThreadExtras<T> extras;
    extras.has_distance = c.has_distance;
    extras.min_std = min_std;
    extras.x_prev[0] = extras.grad_squares[0] = T(0);
    if (c.grad_distance != nullptr) {
      extras.grad_squares[0] = static_cast<const T*>(c.grad_distance)[b * c.grad_distance_stride];
    }
    FASTDIFF_ROLLED
    for (int i = 0; i < 4; ++i) {
      const Index index = 4 * counter + Index(i);
      if (int64_t(index) >= c.sample) break;
      int64_t from[7], to[5];
      locate(c, index, b, inputs, from);
      locate(c, index, b, outputs, to);
      T in[7][1] = {}, dx[1] = {}, dm[1] = {}, dv[1] = {}, dz[1] = {};
      if (s.valid) {
        FASTDIFF_UNROLL
        for (int k = 0; k < 7; ++k) {
          if (inputs[k]->data != nullptr) in[k][0] = load_one<T>(*inputs[k], from[k]);
        }
        if (c.seeds != nullptr) in[6][0] = pick(made, i);
        if (!c.learned) {
          extras.x_prev[0] = in[4][0];
          if (c.has_distance && c.grad_distance == nullptr) {
            extras.grad_squares[0] = load_one<T>(c.grad_learned_or_squares, to[2]);
          }
        }
        extras.element = i;
        with_rounding<T>(c.state, c.flags, [&](auto rnd) {
          backward_vector(s, c, rnd, in[0], in[1], in[2], in[3], in[4], in[6], in[5], dx, dm, dv, dz, extras);
        });
      }
      const T gradients[5] = {dx[0], dm[0], dv[0], in[5][0], dz[0]};
      FASTDIFF_UNROLL
      for (int k = 0; k < 5; ++k) {
        if (outputs[k]->data != nullptr && (k != 2 || c.learned)) store_one(*outputs[k], to[k], gradients[k]);
      }
    }
    if (c.sums != nullptr) {
      const int64_t left = c.sample - 4 * int64_t(counter);
      extras.sums.finish(left > 4 ? 4 : int(left));
      sum_block(extras.sums.second, static_cast<T*>(c.sums) + b * kSums * leaves + leaf, leaves);
    }
  });
}
static_assert(sizeof(PackedSums) + sizeof(double) <= 4096, "what a kernel may be told");

}  // namespace cuda
}  // namespace fastdiff
