// The loops of the CPU kernel. Compiled once per instruction set (FASTDIFF_ISA names the build) without torch; plain
// loops that the compiler vectorises, all arithmetic in step.h and philox.h. Nothing here may be an ordinary inline
// function or a shared template: the linker would merge the builds' copies and run AVX-512 code on a machine without.
#include "step_cpu.h"

#include <type_traits>

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#ifndef FASTDIFF_ISA
#define FASTDIFF_ISA base
#endif

namespace fastdiff {
namespace FASTDIFF_ISA {
namespace {

constexpr int kBlock = kLeaf;       // elements that go through the stages of a step at a time: all stages in L1
constexpr int kCounterBlock = 128;  // Philox counters at a time

template <class T, class Codec>
void load_run(T* dst, const char* data, int64_t first, int64_t stride, int64_t n) {
  const auto* src = reinterpret_cast<const typename Codec::Storage*>(data) + first;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = T(Codec::load(src[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i] = T(Codec::load(src[i * stride]));
  }
}

// Conversion of whole vectors of half: compilers do not turn a loop over the scalar instruction into these.
#if defined(__F16C__)
constexpr int64_t kHalfVector = 8;

FASTDIFF_HD void load_vector(float* dst, const uint16_t* src) {
  _mm256_storeu_ps(dst, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(src))));
}

FASTDIFF_HD void store_vector(uint16_t* dst, const float* src) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(dst), _mm256_cvtps_ph(_mm256_loadu_ps(src), _MM_FROUND_TO_NEAREST_INT));
}

template <>
void load_run<float, Float16>(float* dst, const char* data, int64_t first, int64_t stride, int64_t n) {
  const auto* src = reinterpret_cast<const uint16_t*>(data) + first;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kHalfVector <= n; i += kHalfVector) load_vector(dst + i, src + i);
  }
  for (; i < n; ++i) dst[i] = Float16::load(src[i * stride]);
}
#endif

template <class T, class Codec>
void store_run(const T* src, char* data, int64_t first, int64_t stride, int64_t n) {
  auto* dst = reinterpret_cast<typename Codec::Storage*>(data) + first;
  if (stride == 1) {
    for (int64_t i = 0; i < n; ++i) dst[i] = Codec::store(float(src[i]));
  } else {
    for (int64_t i = 0; i < n; ++i) dst[i * stride] = Codec::store(float(src[i]));
  }
}

#if defined(__F16C__)
template <>
void store_run<float, Float16>(const float* src, char* data, int64_t first, int64_t stride, int64_t n) {
  auto* dst = reinterpret_cast<uint16_t*>(data) + first;
  int64_t i = 0;
  if (stride == 1) {
    for (; i + kHalfVector <= n; i += kHalfVector) store_vector(dst + i, src + i);
  }
  for (; i < n; ++i) dst[i * stride] = Float16::store(src[i]);
}
#endif

void load(float* dst, const Operand& o, int64_t first, int64_t stride, int64_t n) {
  switch (o.dtype) {
    case DType::kFloat16: return load_run<float, Float16>(dst, o.data, first, stride, n);
    case DType::kBFloat16: return load_run<float, BFloat16>(dst, o.data, first, stride, n);
    case DType::kFloat64: {
      const auto* src = reinterpret_cast<const double*>(o.data) + first;
      for (int64_t i = 0; i < n; ++i) dst[i] = float(src[i * stride]);
      return;
    }
    case DType::kFloat32: return load_run<float, Float32>(dst, o.data, first, stride, n);
  }
}

void load(double* dst, const Operand& o, int64_t first, int64_t stride, int64_t n) {
  if (o.dtype == DType::kFloat64) {
    const auto* src = reinterpret_cast<const double*>(o.data) + first;
    for (int64_t i = 0; i < n; ++i) dst[i] = src[i * stride];
    return;
  }
  float narrow[kBlock];
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t count = n - done < kBlock ? n - done : kBlock;
    load(narrow, o, first + done * stride, stride, count);
    for (int64_t i = 0; i < count; ++i) dst[done + i] = narrow[i];
  }
}

void store(const float* src, const Operand& o, int64_t first, int64_t stride, int64_t n) {
  switch (o.dtype) {
    case DType::kFloat16: return store_run<float, Float16>(src, o.data, first, stride, n);
    case DType::kBFloat16: return store_run<float, BFloat16>(src, o.data, first, stride, n);
    default: return store_run<float, Float32>(src, o.data, first, stride, n);
  }
}

void store(const double* src, const Operand& o, int64_t first, int64_t stride, int64_t n) {
  if (o.dtype == DType::kFloat64) {
    auto* dst = reinterpret_cast<double*>(o.data) + first;
    for (int64_t i = 0; i < n; ++i) dst[i * stride] = src[i];
    return;
  }
  float narrow[kBlock];
  for (int64_t done = 0; done < n; done += kBlock) {
    const int64_t count = n - done < kBlock ? n - done : kBlock;
    for (int64_t i = 0; i < count; ++i) narrow[i] = float(src[done + i]);
    store(narrow, o, first + done * stride, stride, count);
  }
}

// Calls fn(offset in the block, first element of the operand, stride, count) for the runs of elements
// [first, first + n) of the sample at `base`, in logical order, that lie along the last dimension.
template <class Fn>
FASTDIFF_HD void for_each_run(const Shape& shape, const Operand& o, int64_t base, int64_t first, int64_t n, Fn fn) {
  const int last = shape.ndim - 1;
  int64_t done = 0;
  while (done < n) {
    int64_t rest = first + done;
    const int64_t inner = rest % shape.sizes[last];
    rest /= shape.sizes[last];
    int64_t offset = base + inner * o.strides[last];
    for (int d = last - 1; d >= 0; --d) {
      offset += rest % shape.sizes[d] * o.strides[d];
      rest /= shape.sizes[d];
    }
    const int64_t left = shape.sizes[last] - inner;
    const int64_t count = left < n - done ? left : n - done;
    fn(done, offset, o.strides[last], count);
    done += count;
  }
}

template <class T>
void gather_run(const Shape& shape, const Operand& o, int64_t base, int64_t first, int64_t n, T* buffer) {
  for_each_run(shape, o, base, first, n, [&](int64_t at, int64_t offset, int64_t stride, int64_t count) {
    load(buffer + at, o, offset, stride, count);
  });
}

template <class T>
void scatter_run(const Shape& shape, const Operand& o, int64_t base, int64_t first, int64_t n, const T* buffer) {
  for_each_run(shape, o, base, first, n, [&](int64_t at, int64_t offset, int64_t stride, int64_t count) {
    store(buffer + at, o, offset, stride, count);
  });
}

template <class T>
constexpr DType kNativeDType = DType::kFloat32;
template <>
constexpr DType kNativeDType<double> = DType::kFloat64;

// Counters are taken in groups, whose words and normals stay in registers. With intrinsics, because compilers find
// neither the 32 x 32 -> 64 multiplication of whole vectors nor the way of four vectors to their order in memory.
#if defined(__AVX512F__)
using FloatVector = __m512;
using WordVector = uint32_t __attribute__((vector_size(64)));
using LaneVector = uint64_t __attribute__((vector_size(64)));
#elif defined(__AVX2__)
using FloatVector = __m256;
using WordVector = uint32_t __attribute__((vector_size(32)));
using LaneVector = uint64_t __attribute__((vector_size(32)));
#endif
#if defined(__AVX2__)
// Words side by side, each in a 64-bit lane; what is left in the high half is ignored.
struct Lanes {
  static constexpr int kCount = sizeof(LaneVector) / sizeof(uint64_t);
  LaneVector v;
};
FASTDIFF_HD Lanes same_word(uint32_t word) { return {LaneVector{} + word}; }
FASTDIFF_HD Lanes same_pair(uint32_t word) { return {LaneVector{} + (uint64_t(word) << 32 | word)}; }
FASTDIFF_HD Lanes high_words(Lanes a) { return {a.v >> 32}; }
FASTDIFF_HD Lanes next_key(Lanes key, uint32_t step) { return {key.v + step}; }

struct Words {
  WordVector v;
  Words() : v() {}
  Words(WordVector from) : v(from) {}
  Words(Lanes from) : v((WordVector)from.v) {}
  Words(uint32_t same) : v(WordVector{} + same) {}
};
FASTDIFF_HD Words operator-(Words a, Words b) { return a.v - b.v; }
FASTDIFF_HD Words operator&(Words a, Words b) { return a.v & b.v; }
FASTDIFF_HD Words operator^(Words a, Words b) { return a.v ^ b.v; }
FASTDIFF_HD Words operator<<(Words a, int bits) { return a.v << bits; }

struct Floats {
  FloatVector v;
  Floats() : v() {}
  Floats(FloatVector from) : v(from) {}
  Floats(float same) : v(FloatVector{} + same) {}
};
FASTDIFF_HD Floats operator-(Floats a, Floats b) { return a.v - b.v; }
FASTDIFF_HD Floats operator*(Floats a, Floats b) { return a.v * b.v; }

#if defined(__AVX512F__)
FASTDIFF_HD Lanes load_lanes(const uint64_t* src) { return {(LaneVector)_mm512_load_si512(src)}; }
FASTDIFF_HD Lanes multiply_words(Lanes a, uint32_t factor) {
  return {(LaneVector)_mm512_mul_epu32((__m512i)a.v, _mm512_set1_epi64(factor))};
}
FASTDIFF_HD Lanes mix(Lanes a, Lanes b, Lanes c) {
  return {(LaneVector)_mm512_ternarylogic_epi64((__m512i)a.v, (__m512i)b.v, (__m512i)c.v, 0x96)};
}
// Two words a lane, the first one low: the low words of both, the high words of both.
FASTDIFF_HD Lanes pair_low(Lanes a, Lanes b) {
  return {(LaneVector)_mm512_mask_shuffle_epi32((__m512i)a.v, 0xAAAA, (__m512i)b.v, _MM_PERM_CCAA)};
}
FASTDIFF_HD Lanes pair_high(Lanes a, Lanes b) {
  return {(LaneVector)_mm512_mask_shuffle_epi32((__m512i)b.v, 0x5555, (__m512i)a.v, _MM_PERM_DDBB)};
}
FASTDIFF_HD Floats fma_exact(Floats a, Floats b, Floats c) { return _mm512_fmadd_ps(a.v, b.v, c.v); }
FASTDIFF_HD Floats sqrt_exact(Floats a) { return _mm512_sqrt_ps(a.v); }
FASTDIFF_HD Floats unsigned_to_float(Words a) { return _mm512_cvtepu32_ps((__m512i)a.v); }
FASTDIFF_HD Floats signed_to_float(Words a) { return _mm512_cvtepi32_ps((__m512i)a.v); }
FASTDIFF_HD __m512d unpack_low(Floats a, Floats b) { return (__m512d)_mm512_unpacklo_ps(a.v, b.v); }
FASTDIFF_HD __m512d unpack_high(Floats a, Floats b) { return (__m512d)_mm512_unpackhi_ps(a.v, b.v); }
FASTDIFF_HD void store_unpacked(float* dst, int64_t apart, __m512d a, __m512d b) {
  _mm512_storeu_pd(dst, _mm512_unpacklo_pd(a, b));
  _mm512_storeu_pd(dst + apart, _mm512_unpackhi_pd(a, b));
}
#else
FASTDIFF_HD Lanes load_lanes(const uint64_t* src) {
  return {(LaneVector)_mm256_load_si256(reinterpret_cast<const __m256i*>(src))};
}
FASTDIFF_HD Lanes multiply_words(Lanes a, uint32_t factor) {
  return {(LaneVector)_mm256_mul_epu32((__m256i)a.v, _mm256_set1_epi64x(factor))};
}
FASTDIFF_HD Lanes mix(Lanes a, Lanes b, Lanes c) { return {a.v ^ b.v ^ c.v}; }
FASTDIFF_HD Lanes pair_low(Lanes a, Lanes b) {
  return {(LaneVector)_mm256_blend_epi32((__m256i)a.v, (__m256i)(b.v << 32), 0xAA)};
}
FASTDIFF_HD Lanes pair_high(Lanes a, Lanes b) {
  return {(LaneVector)_mm256_blend_epi32((__m256i)(a.v >> 32), (__m256i)b.v, 0xAA)};
}
FASTDIFF_HD Floats fma_exact(Floats a, Floats b, Floats c) { return _mm256_fmadd_ps(a.v, b.v, c.v); }
FASTDIFF_HD Floats sqrt_exact(Floats a) { return _mm256_sqrt_ps(a.v); }
FASTDIFF_HD Floats unsigned_to_float(Words a) {
  // The halves as the last bits of 2^23 and of 2^39: without these, which cancel exactly, their sum is rounded once.
  const __m256i low = _mm256_blend_epi16((__m256i)a.v, _mm256_set1_epi32(0x4B000000), 0xAA);
  const __m256i high = _mm256_blend_epi16((__m256i)(a.v >> 16), _mm256_set1_epi32(0x53000000), 0xAA);
  return (__m256)low + ((__m256)high - (0x1p39f + 0x1p23f));
}
FASTDIFF_HD Floats signed_to_float(Words a) { return _mm256_cvtepi32_ps((__m256i)a.v); }
FASTDIFF_HD __m256d unpack_low(Floats a, Floats b) { return (__m256d)_mm256_unpacklo_ps(a.v, b.v); }
FASTDIFF_HD __m256d unpack_high(Floats a, Floats b) { return (__m256d)_mm256_unpackhi_ps(a.v, b.v); }
FASTDIFF_HD void store_unpacked(float* dst, int64_t apart, __m256d a, __m256d b) {
  _mm256_storeu_pd(reinterpret_cast<double*>(dst), _mm256_unpacklo_pd(a, b));
  _mm256_storeu_pd(reinterpret_cast<double*>(dst + apart), _mm256_unpackhi_pd(a, b));
}
#endif
FASTDIFF_HD Lanes mix_words(Lanes product, Lanes word, uint32_t key) {
  return mix(high_words(product), word, same_word(key));
}
FASTDIFF_HD Lanes mix_words(Lanes product, Lanes word, Lanes key) { return mix(high_words(product), word, key); }

constexpr int kGroup = 2 * Lanes::kCount;

// Where counter j of a group stands among its lanes: so that the normals of those counters that fill a vector together
// are then, of four vectors, in the same squares of 4 x 4, which are turned without crossing 128 bits.
constexpr int place_of(int j) {
  constexpr int kSquares = kGroup / 4;
  const int column = j / kSquares, square = j % kSquares;
  return column % 2 * Lanes::kCount + square * 2 + column / 2;
}

// The last round of Philox, which makes one vector of two, and the normals of these.
FASTDIFF_HD void finish_group(const Lanes (&a)[4], const Lanes (&b)[4], Lanes key0, Lanes key1, float* z) {
  const Lanes a0 = multiply_words(a[0], kFactor0), b0 = multiply_words(b[0], kFactor0);
  const Lanes a1 = multiply_words(a[2], kFactor1), b1 = multiply_words(b[2], kFactor1);
  const Words w0 = mix(pair_high(a1, b1), pair_low(a[1], b[1]), key0);
  const Words w2 = mix(pair_high(a0, b0), pair_low(a[3], b[3]), key1);
  Floats lanes[4];
  box_muller(w0, Words(pair_low(a1, b1)), lanes[0], lanes[1]);
  box_muller(w2, Words(pair_low(a0, b0)), lanes[2], lanes[3]);
  store_unpacked(z, kGroup, unpack_low(lanes[0], lanes[1]), unpack_low(lanes[2], lanes[3]));
  store_unpacked(z + 2 * kGroup, kGroup, unpack_high(lanes[0], lanes[1]), unpack_high(lanes[2], lanes[3]));
}

constexpr int kVectors = 4;  // of counters at a time, so that there is other work while a product is waited for

// The first products of the counters from 0 on.
struct FirstProducts {
  alignas(64) uint64_t at[kVectors * Lanes::kCount];
  constexpr FirstProducts() : at() {
    for (int j = 0; j < kVectors * Lanes::kCount; ++j) {
      at[j / kGroup * kGroup + place_of(j % kGroup)] = uint64_t(j) * kFactor0;
    }
  }
};

// Groups of counters that follow one another. Of such a counter only the first word varies: half of the first two
// rounds is the same for all, and the first product goes up by the same from group to group.
class CounterGroups {
 public:
  CounterGroups(uint64_t counter, const Stream& s) {
    static constexpr FirstProducts kFirst;
    const uint32_t key0 = uint32_t(s.seed), key1 = uint32_t(s.seed >> 32);
    const uint64_t same1 = fastdiff::multiply_words(uint64_t(s.domain), kFactor1);
    const uint64_t same0 = fastdiff::multiply_words(fastdiff::mix_words(same1, s.t, key0), kFactor0);
    first_mix_ = same_word(s.repeat ^ key1);
    mix0_ = same_word(uint32_t(same1) ^ (key0 + kKeyStep0));
    mix2_ = same_word(uint32_t(same0 >> 32) ^ (key1 + kKeyStep1));
    word3_ = same_word(uint32_t(same0));
    key0_ = key0 + 2 * kKeyStep0;
    key1_ = key1 + 2 * kKeyStep1;
    for (int i = 0; i < kVectors; ++i) {
      products_[i] = {load_lanes(&kFirst.at[i * Lanes::kCount]).v + counter * kFactor0};
    }
  }

  // The normals of the next kVectors / 2 groups or, at the end, of one.
  template <int kCount>
  FASTDIFF_HD void make(float* z) {
    Lanes c[kCount][4];
    for (int i = 0; i < kCount; ++i) {
      const Lanes p0 = products_[i];
      const Lanes p1 = multiply_words({high_words(p0).v ^ first_mix_.v}, kFactor1);
      c[i][0] = {high_words(p1).v ^ mix0_.v};
      c[i][1] = p1;
      c[i][2] = {p0.v ^ mix2_.v};
      c[i][3] = word3_;
      products_[i].v += uint64_t(kCount * Lanes::kCount) * kFactor0;
    }
    uint32_t last0 = key0_, last1 = key1_;
    FASTDIFF_UNROLL
    for (int round = 2; round < 9; ++round) {
      uint32_t next0 = 0, next1 = 0;
      for (auto& vector : c) {
        next0 = last0;
        next1 = last1;
        philox_rounds<1>(vector, next0, next1);
      }
      last0 = next0;
      last1 = next1;
    }
    for (int i = 0; i < kCount; i += 2) {
      finish_group(c[i], c[i + 1], same_pair(last0), same_pair(last1), z + i / 2 * 4 * kGroup);
    }
  }

 private:
  Lanes products_[kVectors], first_mix_, mix0_, mix2_, word3_;
  uint32_t key0_, key1_;
};

// The normals of groups of counters from `counter` on.
void make_groups(uint64_t counter, int groups, const Stream& s, float* z) {
  CounterGroups counters(counter, s);
  for (; groups >= kVectors / 2; groups -= kVectors / 2, z += 2 * kVectors * kGroup) counters.make<kVectors>(z);
  if (groups > 0) counters.make<2>(z);
}

// The normals of groups of counters that each have their own index and seed, which stand at their places.
void make_groups(const uint64_t* index, const uint64_t* seeds, int groups, const Stream& s, float* z) {
  for (int at = 0; at < groups * kGroup; at += kGroup) {
    Lanes c[2][4], key0[2], key1[2];
    FASTDIFF_UNROLL
    for (int i = 0; i < 2; ++i) {
      key0[i] = load_lanes(seeds + at + i * Lanes::kCount);
      key1[i] = high_words(key0[i]);
      c[i][0] = load_lanes(index + at + i * Lanes::kCount);
      c[i][1] = same_word(s.t);
      c[i][2] = same_word(s.domain);
      c[i][3] = same_word(s.repeat);
    }
    FASTDIFF_UNROLL
    for (int round = 0; round < 9; ++round) {
      for (int i = 0; i < 2; ++i) philox_rounds<1>(c[i], key0[i], key1[i]);
    }
    finish_group(c[0], c[1], pair_low(key0[0], key0[1]), pair_low(key1[0], key1[1]), z + 4 * at);
  }
}
#else
constexpr int kGroup = 16;
constexpr int place_of(int j) { return j; }

// The normals of groups of counters: fill(c, j) gives counter j and its seed.
template <class Fill>
FASTDIFF_HD void make_groups_of(int groups, const Stream& s, float* z, Fill fill) {
  for (int group = 0; group < groups; ++group, z += 4 * kGroup) {
    uint32_t words[4][kGroup];
    float lanes[4][kGroup];
    for (int j = 0; j < kGroup; ++j) {
      uint64_t c[4] = {0, s.t, s.domain, s.repeat};
      philox4x32_10(c, fill(c[0], group * kGroup + j));
      for (int lane = 0; lane < 4; ++lane) words[lane][j] = uint32_t(c[lane]);
    }
    for (int pair = 0; pair < 4; pair += 2) {
      for (int j = 0; j < kGroup; ++j) {
        box_muller(words[pair][j], words[pair + 1][j], lanes[pair][j], lanes[pair + 1][j]);
      }
    }
    for (int j = 0; j < kGroup; ++j) {
      for (int lane = 0; lane < 4; ++lane) z[4 * j + lane] = lanes[lane][j];
    }
  }
}

void make_groups(uint64_t counter, int groups, const Stream& s, float* z) {
  make_groups_of(groups, s, z, [&](uint64_t& index, int j) {
    index = counter + uint64_t(j);
    return s.seed;
  });
}

void make_groups(const uint64_t* index, const uint64_t* seeds, int groups, const Stream& s, float* z) {
  make_groups_of(groups, s, z, [&](uint64_t& first, int j) {
    first = index[j];
    return seeds[j];
  });
}
#endif

// The places of the counters of a block.
struct Places {
  uint8_t at[kCounterBlock];
  constexpr Places() : at() {
    for (int j = 0; j < kCounterBlock; ++j) at[j] = uint8_t(j / kGroup * kGroup + place_of(j % kGroup));
  }
};

int groups_of(int64_t counters) { return int((counters + kGroup - 1) / kGroup); }

// The normals of elements [first, first + n) of a sample.
void normals(float* z, int64_t first, int64_t n, const Stream& s) {
  uint64_t counter = uint64_t(first) / 4;
  int skip = int(first % 4);
  const int whole = skip == 0 ? int(n / (4 * kGroup)) : 0;
  if (whole > 0) {
    make_groups(counter, whole, s, z);
    counter += uint64_t(whole) * kGroup;
    z += int64_t(whole) * 4 * kGroup;
    n -= int64_t(whole) * 4 * kGroup;
  }
  alignas(64) float block[4 * kCounterBlock];
  while (n > 0) {
    const int64_t available = 4 * kCounterBlock - skip;
    const int count = int(n < available ? n : available);
    make_groups(counter, groups_of((skip + count + 3) / 4), s, block);
    memcpy(z, block + skip, size_t(count) * sizeof(float));
    z += count;
    n -= count;
    counter += kCounterBlock;
    skip = 0;
  }
}

// Samples of `size` elements that follow one another in memory, each with a seed of its own.
struct Samples {
  int64_t size;
  const int64_t* seeds;
  int64_t stride;
};

// The normals of elements [first, first + n) of all samples in one row. Where samples are short, several share a block:
// every lane of a vector has its own key.
void normals(float* z, int64_t first, int64_t n, const Samples& all, Stream s) {
  constexpr int64_t kShort = 63;  // from here on groups of one sample are as fast, even where the last is not whole
  int64_t sample = first / all.size, at = first % all.size;
  const auto step = [&](int64_t count) {
    at += count;
    n -= count;
    if (at == all.size) {
      at = 0;
      ++sample;
    }
  };
  if (all.size > kShort || all.size % (4 * kGroup) == 0) {
    while (n > 0) {
      const int64_t count = n < all.size - at ? n : all.size - at;
      s.seed = uint64_t(all.seeds[sample * all.stride]);
      normals(z, at, count, s);
      z += count;
      step(count);
    }
    return;
  }
  alignas(64) float block[4 * kCounterBlock + 4];
  alignas(64) uint64_t index[kCounterBlock] = {}, seeds[kCounterBlock] = {};
  uint8_t counts[kCounterBlock];
  static constexpr Places kPlaces;
  while (n > 0) {
    const int64_t skip = at % 4;  // of the first counter; the others begin at a lane 0
    const int64_t left = n;
    int counters = 0;
    for (; n > 0 && counters < kCounterBlock; ++counters) {
      const int64_t rest = all.size - at;
      int64_t count = counters == 0 ? 4 - skip : 4;
      count = count < rest ? count : rest;
      count = count < n ? count : n;
      const int place = kPlaces.at[counters];
      index[place] = uint64_t(at) / 4;
      seeds[place] = uint64_t(all.seeds[sample * all.stride]);
      counts[counters] = uint8_t(count);
      step(count);
    }
    make_groups(index, seeds, groups_of(counters), s, block);
    // Four at a time; what is too much, the next counter overwrites. Near the end, where there is no room, exactly.
    const float* from = block + skip;
    const float* const last = z + (left - n);
    for (int j = 0; j < counters; ++j) {
      if (last - z >= 4) {
        memcpy(z, from, 4 * sizeof(float));
      } else {
        for (int i = 0; i < counts[j]; ++i) z[i] = from[i];
      }
      z += counts[j];
      from = block + 4 * (j + 1);
    }
  }
}

template <class... Source>
void normals(double* z, int64_t first, int64_t n, const Source&... source) {
  float narrow[4 * kCounterBlock];
  for (int64_t done = 0; done < n; done += 4 * kCounterBlock) {
    const int64_t count = n - done < 4 * kCounterBlock ? n - done : 4 * kCounterBlock;
    normals(narrow, first + done, count, source...);
    for (int64_t i = 0; i < count; ++i) z[done + i] = narrow[i];
  }
}

// out may be x, m or x0's memory exactly (ivdep: nothing is carried from one element to another).
template <class T, class Flags, class Round>
FASTDIFF_HD void run_elements(const Row<T>& row, Flags f, Round rnd, bool has_noise, int64_t n, const T* x, const T* m,
                              const T* z, T* out, T* x0_out) {
  const Row<T> r = row;
  if (x0_out != nullptr) {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const T xi[1] = {x[i]}, mi[1] = {m[i]}, szi[1] = {has_noise ? rnd(r.s * rnd(z[i])) : T(0)};
      T value[1], x0[1];
      step_elements(r, f, rnd, has_noise, xi, mi, szi, value, x0);
      out[i] = value[0];
      x0_out[i] = x0[0];
    }
  } else {
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) {
      const T xi[1] = {x[i]}, mi[1] = {m[i]}, szi[1] = {has_noise ? rnd(r.s * rnd(z[i])) : T(0)};
      T value[1], x0[1];
      step_elements(r, f, rnd, has_noise, xi, mi, szi, value, x0);
      out[i] = value[0];
    }
  }
}

template <class T>
using Run = void (*)(const Row<T>&, int flags, bool has_noise, int64_t n, const T* x, const T* m, const T* z, T* out,
                     T* x0_out);

template <class T>
void run_any(const Row<T>& row, int flags, bool has_noise, int64_t n, const T* x, const T* m, const T* z, T* out,
             T* x0_out) {
  run_elements(row, RuntimeFlags{flags}, KeepPrecision{}, has_noise, n, x, m, z, out, x0_out);
}

template <class Format>
void run_rounded(const Row<float>& row, int flags, bool has_noise, int64_t n, const float* x, const float* m,
                 const float* z, float* out, float* x0_out) {
  run_elements(row, RuntimeFlags{flags}, RoundTo<Format>{}, has_noise, n, x, m, z, out, x0_out);
}

// 256-bit vectors, also where there are wider ones: 512-bit loads run so far ahead that they meet stores to addresses
// equal in their last 12 bits, which costs up to 1.6 times where out lies a few lines behind x, as allocators like it.
#if defined(__AVX512F__) && !defined(__clang__)
#define FASTDIFF_STREAM __attribute__((target("prefer-vector-width=256")))
#else
#define FASTDIFF_STREAM
#endif

template <int kFlags, bool kNoise>
FASTDIFF_STREAM void run_static(const Row<float>& row, int, bool, int64_t n, const float* x, const float* m,
                                const float* z, float* out, float* x0_out) {
  run_elements(row, StaticFlags<kFlags>{}, KeepPrecision{}, kNoise, n, x, m, z, out, x0_out);
}

// Writes a block past the caches, whole lines of them: they would be fetched only to be overwritten, and leave again
// before anybody reads them.
void stream_run(const float* src, float* dst, int64_t n) {
  int64_t i = 0;
#if defined(__AVX2__)
  for (; i + 8 <= n; i += 8) _mm256_stream_ps(dst + i, _mm256_loadu_ps(src + i));
#endif
  for (; i < n; ++i) dst[i] = src[i];
}
void stream_run(const double* src, double* dst, int64_t n) { memcpy(dst, src, size_t(n) * sizeof(double)); }

// The structures that the samplers and the codebases they replace have: these get a loop of their own. Any other
// structure runs the same arithmetic with its flags tested per element.
constexpr int kStructureMask =
    kScalars | kX0FromX | kX0Divide | kClip | kEpsRederived | kEpsLinear | kEpsDivide | kHasA0 | kHasAx | kHasAe;

struct StaticRun {
  int flags;
  Run<float> plain, noisy;
};

template <int kFlags>
constexpr StaticRun static_run() {
  return {kFlags, run_static<kFlags, false>, run_static<kFlags, true>};
}

#define FASTDIFF_WITH_CLIP(flags) static_run<(flags)>(), static_run<(flags) | kClip>()
const StaticRun kStaticRuns[] = {
    FASTDIFF_WITH_CLIP(kX0FromX | kHasA0 | kHasAx),                               // DDPM
    FASTDIFF_WITH_CLIP(kX0FromX | kHasA0 | kHasAe),                               // DDIM
    FASTDIFF_WITH_CLIP(kX0FromX | kX0Divide | kHasA0 | kHasAx),                   // diffusers DDPM
    FASTDIFF_WITH_CLIP(kX0FromX | kX0Divide | kHasA0 | kHasAe),                   // diffusers DDIM
    FASTDIFF_WITH_CLIP(kX0FromX | kEpsRederived | kHasA0 | kHasAe),               // DDIM, eps re-derived
    FASTDIFF_WITH_CLIP(kX0FromX | kEpsRederived | kEpsDivide | kHasA0 | kHasAe),  // OpenAI DDIM
    FASTDIFF_WITH_CLIP(kX0FromX | kX0Divide | kEpsRederived | kEpsDivide | kHasA0 |
                       kHasAe),                                     // use_clipped_model_output
    FASTDIFF_WITH_CLIP(kX0FromX | kEpsLinear | kHasA0 | kHasAe),    // DDIM, v
    FASTDIFF_WITH_CLIP(kEpsLinear | kEpsDivide | kHasA0 | kHasAe),  // diffusers DDIM, x0
    FASTDIFF_WITH_CLIP(kHasA0 | kHasAx),                            // DDPM, x0
    FASTDIFF_WITH_CLIP(kEpsRederived | kHasA0 | kHasAe),            // DDIM, x0
    FASTDIFF_WITH_CLIP(kEpsRederived | kEpsDivide | kHasA0 | kHasAe),
    FASTDIFF_WITH_CLIP(kX0FromX | kHasAx | kHasAe),                      // sprite course
    FASTDIFF_WITH_CLIP(kEpsLinear | kEpsDivide | kHasAe),                // the same as the course computes it
    FASTDIFF_WITH_CLIP(kX0FromX | kEpsRederived | kEpsDivide | kHasAe),  // ermongroup DDPM
    FASTDIFF_WITH_CLIP(kX0FromX | kHasA0),                               // the parts of a step: x0 alone
    FASTDIFF_WITH_CLIP(kX0FromX | kX0Divide | kHasA0),
    FASTDIFF_WITH_CLIP(kHasA0),
    FASTDIFF_WITH_CLIP(kEpsLinear | kHasAe),  // eps alone, of v
    FASTDIFF_WITH_CLIP(kX0FromX | kHasAe),    // x_{t-1} prediction
    FASTDIFF_WITH_CLIP(kHasAx),               // forward process
};
#undef FASTDIFF_WITH_CLIP

Run<double> find_run(double, const StepCall&, bool) { return run_any<double>; }

Run<float> find_run(float, const StepCall& call, bool has_noise) {
  if (call.flags & kHostRounding) {
    if (call.x.dtype == DType::kFloat16) return run_rounded<Float16>;
    if (call.x.dtype == DType::kBFloat16) return run_rounded<BFloat16>;
  }
  for (const StaticRun& r : kStaticRuns) {
    if (r.flags == (call.flags & kStructureMask)) return has_noise ? r.noisy : r.plain;
  }
  return run_any<float>;
}

template <class T, class Round>
void guide_run(Round rnd, int64_t n, const T* cond, const T* uncond, T scale, T* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = guide(rnd, cond[i], uncond[i], scale);
}

// From the mean, in `out`, to x', and from there to the squares of its deviations in standard deviations.
template <class T, class Round>
void noise_run(Round rnd, int64_t n, const T* mean, const T* z, T s, T* out) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = rnd(mean[i] + rnd(s * rnd(z[i])));
}

template <class T>
void squares_run(int64_t n, const T* x_prev, const T* mean, T sd, T* squares) {
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) {
    const T away = deviation(x_prev[i], mean[i], sd);
    squares[i] = away * away;
  }
}

// Rounds what was computed in float to the state's dtype.
void round_run(float* values, int64_t n, DType state) {
  uint16_t halves[kBlock];
  Operand half;
  half.data = reinterpret_cast<char*>(halves);
  half.dtype = state;
  store(values, half, 0, 1, n);
  load(values, half, 0, 1, n);
}

// One level of the tree: the sums of kPairs pairs of neighbours.
template <int kPairs, class T>
FASTDIFF_HD void add_neighbours(const T* from, T* to) {
  for (int i = 0; i < kPairs; ++i) to[i] = from[2 * i] + from[2 * i + 1];
}

// The sum of kCount values, a power of two.
template <int kCount, class T>
FASTDIFF_HD T tree_sum(const T* values) {
  if constexpr (kCount == 1) {
    return values[0];
  } else {
    T half[kCount / 2];
    add_neighbours<kCount / 2>(values, half);
    return tree_sum<kCount / 2>(half);
  }
}

template <class T, class Round>
void learned_run(Round rnd, const Row<T>& row, Variance kind, int64_t n, const T* learned, const T* z, T* out) {
  const Row<T> r = row;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = rnd(learned_scale(r, kind, rnd, learned[i]) * rnd(z[i]));
}

template <class T, class Round>
void velocity_run(Round rnd, const Row<T>& row, int64_t n, const T* x, const T* z, T* out) {
  const T ax = row.ax, s = row.s;
#pragma GCC ivdep
  for (int64_t i = 0; i < n; ++i) out[i] = rnd(rnd(ax * rnd(z[i])) - rnd(s * x[i]));
}

// Walks the elements of a call block by block, in any layout: converts or gathers what Kernel computes with, makes the
// noise, and puts away what comes of it. Kernel is the class derived from this: compute_rounded(rnd, block, n) does a
// block, in_one_stage() says whether a block may be a whole run of units. state: the dtype that a host would round to.
// has_noise: whether it needs z. absent: what a sample gives whose timestep is not in the chain.
template <class Kernel, class T, class AnyCall, int kInputs, int kOutputs>
class Walk {
 public:
  void units(int64_t begin, int64_t end) {
    const int64_t per_sample = units_per_sample(call_);
    if (kernel().in_one_stage()) {
      while (begin < end) {
        enter_sample(begin / per_sample);
        const int64_t sample_end = (begin / per_sample + 1) * per_sample;
        const int64_t stop = end < sample_end ? end : sample_end;
        const int64_t first = begin % per_sample * kUnit;
        const int64_t last = stop == sample_end ? call_.sample : stop % per_sample * kUnit;
        flat(first, last - first);
        begin = stop;
      }
      return;
    }
    for (int64_t unit = begin; unit < end; ++unit) {
      enter_sample(unit / per_sample);
      const int64_t index = unit % per_sample;
      if (call_.layout == Layout::kChannelsLast) {
        columns(index);
      } else {
        const int64_t last = (index + 1) * kUnit < call_.sample ? (index + 1) * kUnit : call_.sample;
        for (int64_t first = index * kUnit; first < last; first += kBlock) {
          const int64_t n = last - first < kBlock ? last - first : kBlock;
          leaf_ = first / kLeaf;
          if (call_.layout == Layout::kFlat) {
            flat(first, n);
          } else {
            strided(first, n);
          }
        }
      }
    }
  }

 protected:
  // Pointers to one block of elements, already in the type computed in; null where the call has no such operand.
  struct Block {
    const T* in[kInputs];
    T* z;
    T* out[kOutputs];
  };

  Walk(const AnyCall& call, DType state, bool has_noise, T absent, const Operand* const (&inputs)[kInputs],
       const Operand* const (&outputs)[kOutputs])
      : call_(call), has_noise_(has_noise), state_(state), absent_(absent) {
    for (int k = 0; k < kInputs; ++k) inputs_[k] = inputs[k];
    for (int k = 0; k < kOutputs; ++k) outputs_[k] = outputs[k];
  }

  const AnyCall& call_;
  const bool has_noise_;
  Row<T> row_ = {};
  T scale_ = T(0);
  int64_t b_ = -1, leaf_ = 0;  // the sample and, in logical order, the leaf of it that a block is

 private:
  Kernel& kernel() { return static_cast<Kernel&>(*this); }

  void enter_sample(int64_t b) {
    if (b == b_) return;
    b_ = b;
    const int64_t row = find_row(call_, b);
    valid_ = row >= 0;
    if (!valid_) return;
    const T* columns = static_cast<const T*>(call_.table) + row * kColumns;
    with_rounding<T>(state_, call_.flags, [&](auto rnd) { row_ = load_row(columns, call_.flags, rnd); });
    if (call_.scale != nullptr) scale_ = static_cast<const T*>(call_.scale)[b * call_.scale_stride];
    if (call_.seeds != nullptr) {
      stream_ = {uint64_t(call_.seeds[b * call_.seeds_stride]), row_.t, uint32_t((call_.flags >> kDomainShift) & 3),
                 row_.repeat};
    }
  }

  void compute(const Block& blk, int64_t n) {
    if (!valid_) {
      for (T* const out : blk.out) {
        for (int64_t i = 0; out != nullptr && i < n; ++i) out[i] = absent_;
      }
    } else {
      with_rounding<T>(state_, call_.flags, [&](auto rnd) { kernel().compute_rounded(rnd, blk, n); });
    }
  }

  int64_t base(const Operand& o) const { return b_ * o.batch_stride; }

  // Where the operand already is what is computed in, its own memory; otherwise a converted copy of the block.
  const T* direct(const Operand& o, int64_t first, int64_t n, T* buffer) const {
    if (o.data == nullptr) return nullptr;
    if (o.dtype == kNativeDType<T>) return reinterpret_cast<const T*>(o.data) + base(o) + first;
    load(buffer, o, base(o) + first, 1, n);
    return buffer;
  }

  T* direct_out(const Operand& o, int64_t first, T* buffer) const {
    if (o.data == nullptr) return nullptr;
    if (o.dtype == kNativeDType<T>) return reinterpret_cast<T*>(o.data) + base(o) + first;
    return buffer;
  }

  // A block, of which read(operand, buffer) gives the inputs and place(operand, buffer) the memory of the outputs.
  template <class Read, class Place>
  Block block_of(Read read, Place place, T* z) {
    Block blk;
    blk.z = z;
    for (int k = 0; k < kInputs; ++k) blk.in[k] = read(*inputs_[k], in_[k]);
    for (int k = 0; k < kOutputs; ++k) blk.out[k] = place(*outputs_[k], out_[k]);
    return blk;
  }

  // Where outputs are collected in the buffers.
  static T* buffer_of(const Operand& o, T* buffer) { return o.data == nullptr ? nullptr : buffer; }

  // n elements in memory order from element `first` of every operand, their noise at z.
  void block(int64_t first, int64_t n, T* z) {
    const Block blk = block_of([&](const Operand& o, T* buffer) { return direct(o, first, n, buffer); },
                               [&](const Operand& o, T* buffer) { return direct_out(o, first, buffer); }, z);
    compute(blk, n);
    for (int k = 0; k < kOutputs; ++k) {
      if (blk.out[k] == out_[k]) store(out_[k], *outputs_[k], base(*outputs_[k]) + first, 1, n);
    }
  }

  void flat(int64_t first, int64_t n) {
    if (has_noise_ && valid_) {
      if (call_.joined > 0) {
        normals(z_, first, n, Samples{call_.joined, call_.seeds, call_.seeds_stride}, stream_);
      } else if (call_.seeds != nullptr) {
        normals(z_, first, n, stream_);
      } else {
        load(z_, call_.noise, base(call_.noise) + first, 1, n);
      }
    }
    block(first, n, z_);
  }

  const T* gather(const Operand& o, int64_t first, int64_t n, T* buffer) const {
    if (o.data == nullptr) return nullptr;
    gather_run(call_, o, base(o), first, n, buffer);
    return buffer;
  }

  void scatter(const Operand& o, int64_t first, int64_t n, const T* buffer) const {
    if (o.data != nullptr) scatter_run(call_, o, base(o), first, n, buffer);
  }

  void strided(int64_t first, int64_t n) {
    const Block blk = block_of([&](const Operand& o, T* buffer) { return gather(o, first, n, buffer); }, buffer_of, z_);
    if (has_noise_ && valid_) {
      if (call_.seeds != nullptr) {
        normals(z_, first, n, stream_);
      } else {
        gather(call_.noise, first, n, z_);
      }
    }
    compute(blk, n);
    for (int k = 0; k < kOutputs; ++k) scatter(*outputs_[k], first, n, out_[k]);
  }

  // One run of columns of a sample in channels-last order: the noise is made row by row, in logical order, and turned;
  // everything else is read and written in memory order.
  void columns(int64_t index) {
    const Tiling tile = tiling(call_);
    const int64_t rows = call_.sizes[0], all_columns = call_.sizes[1];
    const int64_t first = index * tile.columns;
    const int64_t width = all_columns - first < tile.columns ? all_columns - first : tile.columns;
    for (int64_t top = 0; top < rows; top += tile.rows) {
      const int64_t height = rows - top < tile.rows ? rows - top : tile.rows;
      const bool gapless = height == rows && dense();
      if (has_noise_ && valid_) {
        if (gapless) {
          for (const Operand* o : inputs_) prefetch(*o, first * rows, width * rows);
        }
        turned_noise(top, height, first, width);
      }
      // Whole columns of a dense operand follow one another without a gap.
      if (gapless) {
        for (int64_t done = 0; done < width * rows; done += kBlock) {
          const int64_t n = width * rows - done < kBlock ? width * rows - done : kBlock;
          block(first * rows + done, n, turned_ + done);
        }
      } else {
        const int64_t at_once = height < kBlock ? kBlock / height : 1;
        for (int64_t j = 0; j < width; j += at_once) {
          const int64_t count = width - j < at_once ? width - j : at_once;
          for (int64_t r = 0; r < height; r += kBlock) {
            const int64_t n = height - r < kBlock ? height - r : kBlock;
            part_columns(top + r, n, first + j, count, j * height + r);
          }
        }
      }
    }
  }

  bool dense() const {
    const auto gapless = [&](const Operand& o) { return o.data == nullptr || o.strides[1] == call_.sizes[0]; };
    for (const Operand* o : inputs_) {
      if (!gapless(*o)) return false;
    }
    for (const Operand* o : outputs_) {
      if (!gapless(*o)) return false;
    }
    return true;
  }

  // Noise takes long enough to make for its operands to arrive from memory meanwhile.
  void prefetch(const Operand& o, int64_t first, int64_t n) const {
    if (o.data == nullptr) return;
    const int64_t size = element_size(o.dtype);
    const char* data = o.data + (base(o) + first) * size;
    for (int64_t at = 0; at < n * size; at += 64) __builtin_prefetch(data + at);
  }

  void turned_noise(int64_t top, int64_t height, int64_t first, int64_t width) {
    const bool one_run = width == call_.sizes[1];
    if (call_.seeds != nullptr && one_run) normals(rows_, top * width, height * width, stream_);
    for (int64_t r = 0; r < height; ++r) {
      T* row = rows_ + r * width;
      if (call_.seeds == nullptr) {
        const Operand& o = call_.noise;
        load(row, o, base(o) + (top + r) * o.strides[0] + first * o.strides[1], o.strides[1], width);
      } else if (!one_run) {
        normals(row, (top + r) * call_.sizes[1] + first, width, stream_);
      }
    }
    // With the number of rows known, the compiler interleaves them with shuffles.
    switch (height) {
      case 1: return turn<1>(1, width);
      case 2: return turn<2>(2, width);
      case 3: return turn<3>(3, width);
      case 4: return turn<4>(4, width);
      default: return turn<0>(height, width);
    }
  }

  template <int kHeight>
  void turn(int64_t height, int64_t width) {
    const int64_t h = kHeight > 0 ? kHeight : height;
    int64_t done = 0;
    if constexpr (kHeight == 0) done = turn_fours(height, width);
    for (int64_t j = 0; j < width; ++j) {
      for (int64_t r = done; r < h; ++r) turned_[j * h + r] = rows_[r * width + j];
    }
  }

  // Turns rows four at a time, in squares of 4 x 4. Returns how many rows that was.
  int64_t turn_fours([[maybe_unused]] int64_t height, [[maybe_unused]] int64_t width) {
#if defined(__x86_64__)
    if constexpr (sizeof(T) == sizeof(float)) {
      for (int64_t r = 0; r + 4 <= height; r += 4) {
        const float* const from = reinterpret_cast<const float*>(rows_) + r * width;
        float* const to = reinterpret_cast<float*>(turned_) + r;
        int64_t j = 0;
        for (; j + 4 <= width; j += 4) {
          __m128 a = _mm_loadu_ps(from + j), b = _mm_loadu_ps(from + width + j);
          __m128 c = _mm_loadu_ps(from + 2 * width + j), d = _mm_loadu_ps(from + 3 * width + j);
          _MM_TRANSPOSE4_PS(a, b, c, d);
          _mm_storeu_ps(to + j * height, a);
          _mm_storeu_ps(to + (j + 1) * height, b);
          _mm_storeu_ps(to + (j + 2) * height, c);
          _mm_storeu_ps(to + (j + 3) * height, d);
        }
        for (; j < width; ++j) {
          for (int64_t i = 0; i < 4; ++i) to[j * height + i] = from[i * width + j];
        }
      }
      return height / 4 * 4;
    }
#endif
    return 0;
  }

  // `count` columns, of which rows [top, top + height): pieces of memory, collected in one block.
  void part_columns(int64_t top, int64_t height, int64_t first, int64_t count, int64_t z_first) {
    const auto collect = [&](const Operand& o, T* buffer) -> const T* {
      if (o.data == nullptr) return nullptr;
      for (int64_t j = 0; j < count; ++j) {
        load(buffer + j * height, o, base(o) + top + (first + j) * o.strides[1], 1, height);
      }
      return buffer;
    };
    const auto distribute = [&](const Operand& o, const T* buffer) {
      if (o.data == nullptr) return;
      for (int64_t j = 0; j < count; ++j) {
        store(buffer + j * height, o, base(o) + top + (first + j) * o.strides[1], 1, height);
      }
    };
    const Block blk = block_of(collect, buffer_of, turned_ + z_first);
    compute(blk, count * height);
    for (int k = 0; k < kOutputs; ++k) distribute(*outputs_[k], out_[k]);
  }

  const DType state_;
  const T absent_;
  const Operand *inputs_[kInputs], *outputs_[kOutputs];
  bool valid_ = false;
  Stream stream_ = {};
  alignas(64) T in_[kInputs][kBlock], z_[kBlock], out_[kOutputs][kBlock];
  alignas(64) T rows_[kTile], turned_[kTile];
};

template <class T>
class Step : public Walk<Step<T>, T, StepCall, 4, 2> {
  using Base = Walk<Step<T>, T, StepCall, 4, 2>;
  using Base::call_, Base::has_noise_, Base::row_, Base::scale_;

 public:
  explicit Step(const StepCall& call)
      : Base(call, call.x.dtype, variance_of(call.flags) != Variance::kNone, T(__builtin_nanf("")),
             {&call.x, &call.model_output, &call.learned, &call.uncond}, {&call.out, &call.second}),
        run_(find_run(T(), call, has_noise_)) {}

  // Whether a step needs none of the block buffers: then it is one loop over a whole run of units.
  bool in_one_stage() const {
    const Operand* const operands[] = {&call_.out, &call_.second, &call_.x, &call_.model_output};
    bool native = call_.layout == Layout::kFlat && !has_noise_ && call_.uncond.data == nullptr;
    for (const Operand* o : operands) native = native && (o->data == nullptr || o->dtype == kNativeDType<T>);
    return native;
  }

  template <class Round>
  void compute_rounded(Round rnd, const typename Base::Block& blk, int64_t n) {
    const auto [x, model_output, learned, uncond] = blk.in;
    const auto [out, second] = blk.out;
    const T* m = model_output != nullptr ? model_output : x;  // a structure without x0 and eps never looks at it
    T guided[kBlock];
    if (uncond != nullptr) {
      guide_run(rnd, n, model_output, uncond, scale_, guided);
      m = guided;
    }
    T* x0_out = nullptr;
    if (second != nullptr) {
      switch (second_of(call_.flags)) {
        case Second::kX0: x0_out = second; break;
        case Second::kNoise:
          for (int64_t i = 0; i < n; ++i) second[i] = blk.z[i];
          break;
        case Second::kVelocity: velocity_run(rnd, row_, n, x, blk.z, second); break;
      }
    }
    Row<T> row = row_;
    const Variance variance = variance_of(call_.flags);
    if (is_learned(variance)) {
      learned_run(rnd, row_, variance, n, learned, blk.z, blk.z);
      row.s = T(1);
    }
    if ((call_.flags & kPastCache) == 0 || n <= kBlock || x0_out != nullptr) {
      run_(row, call_.flags, has_noise_, n, x, m, blk.z, out, x0_out);
      return;
    }
    constexpr int64_t kLine = 64 / sizeof(T);
    alignas(64) T block[kBlock];
    const int64_t before = (kLine - int64_t(reinterpret_cast<uintptr_t>(out) / sizeof(T)) % kLine) % kLine;
    run_(row, call_.flags, false, before, x, m, nullptr, out, nullptr);
    for (int64_t done = before; done < n; done += kBlock) {
      const int64_t count = n - done < kBlock ? n - done : kBlock;
      run_(row, call_.flags, false, count, x + done, m + done, nullptr, block, nullptr);
      stream_run(block, out + done, count);
    }
#if defined(__AVX2__)
    _mm_sfence();  // such stores are seen in their order only after this
#endif
  }

 private:
  const Run<T> run_;
};

// A step that is done, or one that was, and the squares of its deviations from the mean.
template <class T>
class Distance : public Walk<Distance<T>, T, DistanceCall, 4, 2> {
  using Base = Walk<Distance<T>, T, DistanceCall, 4, 2>;
  using Base::call_, Base::row_, Base::scale_;

 public:
  explicit Distance(const DistanceCall& call)
      : Base(call, call.x.dtype, call.out.data != nullptr, T(__builtin_nanf("")),
             {&call.x, &call.model_output, &call.uncond, &call.x_prev}, {&call.out, &call.squares}),
        run_(find_run(T(), call, false)) {}

  bool in_one_stage() const { return false; }

  template <class Round>
  void compute_rounded(Round rnd, const typename Base::Block& blk, int64_t n) {
    const auto [x, model_output, uncond, x_prev] = blk.in;
    const auto [out, squares] = blk.out;
    const T* m = model_output != nullptr ? model_output : x;  // a structure without x0 and eps never looks at it
    if (uncond != nullptr) {
      guide_run(rnd, n, model_output, uncond, scale_, guided_);
      m = guided_;
    }
    run_(row_, call_.flags, false, n, x, m, nullptr, mean_, nullptr);
    if (out != nullptr) {
      noise_run(rnd, n, mean_, blk.z, row_.s, out);
      if constexpr (sizeof(T) == sizeof(float)) {
        if (call_.x.dtype != DType::kFloat32) round_run(out, n, call_.x.dtype);
      }
    }
    const T sd = at_least(row_.s, T(call_.min_std));
    squares_run(n, out != nullptr ? out : x_prev, mean_, sd, squares_);
    if (squares != nullptr) memcpy(squares, squares_, size_t(n) * sizeof(T));
    if (call_.sums != nullptr) {
      for (int64_t i = n; i < kLeaf; ++i) squares_[i] = T(0);
      static_cast<T*>(call_.sums)[this->b_ * leaves_of(call_.sample) + this->leaf_] = tree_sum<kLeaf>(squares_);
    }
  }

 private:
  const Run<T> run_;  // without noise: the mean
  alignas(64) T guided_[kBlock], mean_[kBlock], squares_[kBlock];
};

constexpr int kChunk = 64;
template <class T>
using Chunk = T[kChunk];

// The sums of a leaf, chunk by chunk.
template <class T>
class LeafSums {
 public:
  void start() { memset(terms_, 0, sizeof(terms_)); }

  // The terms of one chunk, of which only the first `count` are; they are overwritten.
  void add(int column, int64_t chunk, int64_t count, Chunk<T>& terms) {
    Chunk<T> halves;
    for (int64_t i = count; i < kChunk; ++i) terms[i] = T(0);
    add_neighbours<kChunk / 2>(terms, halves);
    add_neighbours<kChunk / 4>(halves, terms);
    add_neighbours<kPerChunk>(terms, terms_[column] + chunk * kPerChunk);
    used_ |= 1u << column;
  }

  // to: those of the first column; zeros wait where nothing was added.
  void finish(T* to, int64_t stride) {
    for (int column = 0; column < kSums; ++column) {
      if (used_ >> column & 1) to[column * stride] = tree_sum<kCount>(terms_[column]);
    }
  }

 private:
  static constexpr int kPerChunk = kChunk / 8, kCount = kBlock / 8;

  uint32_t used_ = 0;
  T terms_[kSums][kCount];
};

template <class T, bool kWithTerms>
struct ChunkExtras {
  static constexpr bool kDistance = true, kTerms = kWithTerms;
  bool has_distance;
  T min_std;
  LeafSums<T>& leaf;
  int64_t chunk, count;
  Chunk<T> x_prev, grad_squares;

  FASTDIFF_HD void add(int column, Chunk<T>& terms) { leaf.add(column, chunk, count, terms); }
};

template <class AnyCall>
constexpr int kBackwardInputs = 6;
template <>
constexpr int kBackwardInputs<SumsCall> = 8;

// The backward of a step. Its flags are tested per chunk: every structure runs the same loops, of whole vectors.
// AnyCall: BackwardCall, or SumsCall.
template <class T, class AnyCall>
class StepBackward : public Walk<StepBackward<T, AnyCall>, T, AnyCall, kBackwardInputs<AnyCall>, 5> {
  using Base = Walk<StepBackward<T, AnyCall>, T, AnyCall, kBackwardInputs<AnyCall>, 5>;
  using Base::call_, Base::row_, Base::scale_;

 public:
  explicit StepBackward(const BackwardCall& call)
      : Base(call, call.state, reads_noise(call), T(0),
             {&call.grad, &call.grad_second, &call.x, &call.model_output, &call.learned, &call.uncond},
             {&call.grad_x, &call.grad_model, &call.grad_learned, &call.grad_uncond, &call.grad_noise}) {}
  explicit StepBackward(const SumsCall& call)
      : Base(call, call.state, reads_noise(call), T(0),
             {&call.grad, &call.grad_second, &call.x, &call.model_output, &call.learned, &call.uncond, &call.x_prev,
              &call.grad_squares},
             {&call.grad_x, &call.grad_model, &call.grad_learned, &call.grad_uncond, &call.grad_noise}) {}

  bool in_one_stage() const { return false; }

  template <class Round>
  void compute_rounded(Round rnd, const typename Base::Block& blk, int64_t n) {
    if constexpr (std::is_same_v<AnyCall, BackwardCall>) {
      NoExtras none;
      chunks(rnd, blk, n, none, [](int64_t, int64_t) {});
    } else if (call_.sums != nullptr) {
      LeafSums<T> leaf;
      leaf.start();
      with_extras<true>(rnd, blk, n, leaf);
      const int64_t leaves = leaves_of(call_.sample);
      leaf.finish(static_cast<T*>(call_.sums) + this->b_ * kSums * leaves + this->leaf_, leaves);
    } else {
      LeafSums<T> unused;
      with_extras<false>(rnd, blk, n, unused);
    }
  }

 private:
  template <bool kTerms, class Round>
  void with_extras(Round rnd, const typename Base::Block& blk, int64_t n, LeafSums<T>& leaf) {
    ChunkExtras<T, kTerms> extras = {has_distance(call_), T(call_.min_std), leaf, 0, 0, {}, {}};
    if (call_.grad_distance != nullptr) {
      const T grad = static_cast<const T*>(call_.grad_distance)[this->b_ * call_.grad_distance_stride];
      for (int i = 0; i < kChunk; ++i) extras.grad_squares[i] = grad;
    }
    chunks(rnd, blk, n, extras, [&](int64_t first, int64_t count) {
      take(blk.in[6], first, count, extras.x_prev);
      take(blk.in[7], first, count, extras.grad_squares);
      extras.chunk = first / kChunk;
      extras.count = count;
    });
  }

  // take_extras(first, count) readies the extras for a chunk.
  template <class Round, class Extras, class TakeExtras>
  void chunks(Round rnd, const typename Base::Block& blk, int64_t n, Extras& extras, TakeExtras take_extras) {
    const T *const grad = blk.in[0], *const second = blk.in[1], *const x = blk.in[2], *const model_output = blk.in[3],
                   *const learned = blk.in[4], *const uncond = blk.in[5];
    const auto [grad_x, grad_model, grad_learned, grad_uncond, grad_noise] = blk.out;
    const T* const z = this->has_noise_ ? blk.z : nullptr;
    const RuntimeFlags flags = {call_.flags};
    // Copies that nothing else points into, so that every stage is a loop over vectors; the last chunk may be short.
    Chunk<T> g = {}, h = {}, xs = {}, m = {}, v = {}, zs = {}, mu = {}, dx, dm, dv, dz;
    [[maybe_unused]] Chunk<T> apart;  // the two model outputs
    for (int64_t first = 0; first < n; first += kChunk) {
      const int64_t count = n - first < kChunk ? n - first : kChunk;
      take(grad, first, count, g);
      take(second, first, count, h);
      take(x, first, count, xs);
      take(model_output, first, count, m);
      take(learned, first, count, v);
      take(z, first, count, zs);
      take_extras(first, count);
      if (uncond != nullptr) {
        take(uncond, first, count, mu);
        if constexpr (Extras::kTerms) {
          for (int i = 0; i < kChunk; ++i) apart[i] = rnd(m[i] - mu[i]);
        }
        for (int i = 0; i < kChunk; ++i) m[i] = guide(rnd, m[i], mu[i], scale_);
      }
      step_backward_elements(row_, flags, rnd, grad != nullptr, second != nullptr, g, h, xs, m, v, zs, dx, dm, dv, dz,
                             extras);
      if constexpr (Extras::kTerms) {
        if (uncond != nullptr) add_products(extras, kGuidance, dm, apart);
      }
      if (call_.scale != nullptr) {
        for (int i = 0; i < kChunk; ++i) guide_backward(scale_, dm[i], dm[i], mu[i]);
      }
      put(dx, grad_x, first, count);
      put(dm, grad_model, first, count);
      put(dv, grad_learned, first, count);
      put(mu, grad_uncond, first, count);
      put(dz, grad_noise, first, count);
    }
  }

  static void take(const T* from, int64_t first, int64_t count, Chunk<T>& chunk) {
    if (from == nullptr) return;
    if (count == kChunk) {
      memcpy(chunk, from + first, sizeof(chunk));
    } else {
      for (int64_t i = 0; i < count; ++i) chunk[i] = from[first + i];
    }
  }

  static void put(const Chunk<T>& chunk, T* to, int64_t first, int64_t count) {
    if (to == nullptr) return;
    if (count == kChunk) {
      memcpy(to + first, chunk, sizeof(chunk));
    } else {
      for (int64_t i = 0; i < count; ++i) to[first + i] = chunk[i];
    }
  }
};

template <class T>
using PlainBackward = StepBackward<T, BackwardCall>;
template <class T>
using BackwardWithSums = StepBackward<T, SumsCall>;

template <template <class> class Kernel, class AnyCall>
void walk(const AnyCall& call, DType state, int64_t begin, int64_t end) {
  if (state == DType::kFloat64) {
    Kernel<double>(call).units(begin, end);
  } else {
    Kernel<float>(call).units(begin, end);
  }
}

void step_units(const StepCall& call, int64_t begin, int64_t end) { walk<Step>(call, call.x.dtype, begin, end); }

void step_backward_units(const BackwardCall& call, int64_t begin, int64_t end) {
  walk<PlainBackward>(call, call.state, begin, end);
}

void step_distance_units(const DistanceCall& call, int64_t begin, int64_t end) {
  walk<Distance>(call, call.x.dtype, begin, end);
}

void backward_sums_units(const SumsCall& call, int64_t begin, int64_t end) {
  walk<BackwardWithSums>(call, call.state, begin, end);
}

void normals_units(const NormalsCall& call, int64_t begin, int64_t end) {
  const Samples all = {call.sample, call.seeds, call.seeds_stride};
  const Stream stream = {0, call.t, call.domain, call.repeat};
  const int64_t elements = call.batch * call.sample;
  const int64_t last = end * kUnit < elements ? end * kUnit : elements;
  float block[kBlock];
  for (int64_t first = begin * kUnit; first < last; first += kBlock) {
    const int64_t n = last - first < kBlock ? last - first : kBlock;
    if (call.out.dtype == DType::kFloat32) {
      normals(reinterpret_cast<float*>(call.out.data) + first, first, n, all, stream);
    } else if (call.out.dtype == DType::kFloat64) {
      normals(reinterpret_cast<double*>(call.out.data) + first, first, n, all, stream);
    } else {
      normals(block, first, n, all, stream);
      store(block, call.out, first, 1, n);
    }
  }
}

// Calls fn(values, first, count) for blocks of elements [first, last) of sample b of an operand, in the type computed
// in.
template <class T, class Fn>
FASTDIFF_HD void for_each_block(const ThresholdCall& call, const Operand& o, int64_t b, int64_t first, int64_t last,
                                Fn fn) {
  const int64_t base = b * o.batch_stride;
  if (call.layout == Layout::kFlat && o.dtype == kNativeDType<T>) {
    return fn(reinterpret_cast<const T*>(o.data) + base + first, first, last - first);
  }
  T buffer[kBlock];
  for (; first < last; first += kBlock) {
    const int64_t n = last - first < kBlock ? last - first : kBlock;
    if (call.layout == Layout::kFlat) {
      load(buffer, o, base + first, 1, n);
    } else {
      gather_run(call, o, base, first, n, buffer);
    }
    fn(buffer, first, n);
  }
}

template <class T>
void count_for_threshold(const ThresholdCall& call, int64_t b, int64_t first, int64_t last, ThresholdCounts& counts) {
  const Key<T> one = key_of(T(1)), max_value = key_of(T(call.max_value));
  for_each_block<T>(call, call.x, b, first, last, [&](const T* x, int64_t, int64_t n) {
    // in the width of the keys, so that a vector of one is a vector of the other
    Key<T> at_most_one = 0, under_max = 0, highest = 0;
    for (int64_t i = 0; i < n; ++i) {
      const Key<T> key = bit_cast<Key<T>>(x[i]) & kNanKey<T>;
      at_most_one += Key<T>(key <= one);
      under_max += Key<T>(key < max_value);
      highest = key > highest ? key : highest;
    }
    counts.at_most_one += int64_t(at_most_one);
    counts.under_max += int64_t(under_max);
    counts.highest = highest > counts.highest ? highest : counts.highest;
  });
}

template <class T>
class ThresholdSearcher {
 public:
  explicit ThresholdSearcher(const ThresholdLevel& level, int64_t elements)
      : before_(shift_before<T>(level.index)),
        shift_(shift_of<T>(level.index)),
        prefix_(Key<T>(level.prefix)),
        mask_(Key<T>(bins_of<T>(level.index) - 1)),
        ways_(elements < kMostBins ? 1 : kWays) {
    memset(counts_, 0, size_t(ways_) * sizeof(counts_[0]));
  }

  void run(const T* x, int64_t n) {
    int64_t done = 0;
    for (; done + kGroup <= n; done += kGroup) group(x + done, kGroup);
    for (; done < n; ++done) group(x + done, 1);
  }

  void add_to(ThresholdLevel& level) const {
    for (int way = 0; way < ways_; ++way) {
      for (int bin = 0; bin < kMostBins; ++bin) level.counts[bin] += counts_[way][bin];
    }
    level.next = uint64_t(next_) < level.next ? uint64_t(next_) : level.next;
  }

 private:
  static constexpr int kGroup = 32;  // looked at together: after level 0 most groups have nothing that counts
  // Elements that follow one another are often alike; in a bin of their own, their count waits for no other.
  static constexpr int kWays = 4;

  FASTDIFF_HD void group(const T* x, int n) {
    const Key<T> prefix = prefix_;
    const int before = before_;
    Key<T> keys[kGroup], any = 0, next = next_;
    for (int i = 0; i < n; ++i) keys[i] = key_of(x[i]);
    for (int i = 0; i < n; ++i) {
      const Key<T> of_key = keys[i] >> before, later = of_key > prefix ? keys[i] : kNanKey<T>;
      any |= Key<T>(of_key == prefix);
      next = later < next ? later : next;
    }
    next_ = next;
    if (any == 0) return;
    for (int i = 0; i < n; ++i) {
      if (keys[i] >> before == prefix) ++counts_[i & (ways_ - 1)][(keys[i] >> shift_) & mask_];
    }
  }

  const int before_, shift_;
  const Key<T> prefix_, mask_;
  const int ways_;
  Key<T> next_ = kNanKey<T>;
  uint32_t counts_[kWays][kMostBins];
};

template <class T>
void search_for_threshold(const ThresholdCall& call, int64_t b, int64_t first, int64_t last, ThresholdLevel& level) {
  ThresholdSearcher<T> searcher(level, last - first);
  for_each_block<T>(call, call.x, b, first, last, [&](const T* x, int64_t, int64_t n) { searcher.run(x, n); });
  searcher.add_to(level);
}

template <class T>
void apply_threshold(const ThresholdCall& call, int64_t b, int64_t first, int64_t last, double bound) {
  const Operand& out = call.out;
  const int64_t base = b * out.batch_stride;
  const T s = T(bound);
  const bool direct = call.layout == Layout::kFlat && out.dtype == kNativeDType<T>;
  for_each_block<T>(call, call.x, b, first, last, [&](const T* x, int64_t at, int64_t n) {
    T buffer[kBlock];
    T* const to = direct ? reinterpret_cast<T*>(out.data) + base + at : buffer;
#pragma GCC ivdep
    for (int64_t i = 0; i < n; ++i) to[i] = thresholded(x[i], s);
    if (direct) return;
    if (call.layout == Layout::kFlat) {
      store(buffer, out, base + at, 1, n);
    } else {
      scatter_run(call, out, base, at, n, buffer);
    }
  });
}

bool is_double(const ThresholdCall& call) { return call.x.dtype == DType::kFloat64; }

void threshold_count(const ThresholdCall& call, int64_t b, int64_t first, int64_t last, ThresholdCounts& counts) {
  (is_double(call) ? count_for_threshold<double> : count_for_threshold<float>)(call, b, first, last, counts);
}

void threshold_search(const ThresholdCall& call, int64_t b, int64_t first, int64_t last, ThresholdLevel& level) {
  (is_double(call) ? search_for_threshold<double> : search_for_threshold<float>)(call, b, first, last, level);
}

void threshold_apply(const ThresholdCall& call, int64_t b, int64_t first, int64_t last, double bound) {
  (is_double(call) ? apply_threshold<double> : apply_threshold<float>)(call, b, first, last, bound);
}

}  // namespace

extern const Kernels kKernels = {step_units,    step_backward_units, step_distance_units, backward_sums_units,
                                 normals_units, threshold_count,     threshold_search,    threshold_apply};

}  // namespace FASTDIFF_ISA
}  // namespace fastdiff
