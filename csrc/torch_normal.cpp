// torch.randn of float32 on a CPU, eight numbers at a time: the same generator, the same numbers, the same state after.
// torch draws one number of the Mersenne Twister (Matsumoto & Nishimura 1998) after the other; the pairs of Box and
// Muller are then made with the polynomials of Cephes. Which of their products are fused with a sum is what the
// compiler of torch chose, so fastdiff/mersenne.py compares before it relies on this.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <cstring>

#include "checks.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace fastdiff {
namespace {

constexpr int kWords = 624, kShift = 397;
// torch.Generator.get_state(): the words and where the next one is
constexpr int64_t kLeft = 8, kNext = 16, kState = 24, kBytes = 5056;

#if defined(__x86_64__)
#define FASTDIFF_AVX2 __attribute__((target("avx2,fma")))

bool supported() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
}

uint32_t twist(uint32_t u, uint32_t v) {
  return (((u & 0x80000000u) | (v & 0x7fffffffu)) >> 1) ^ (0x9908b0dfu & (0u - (v & 1u)));
}

FASTDIFF_AVX2 __m256i load(const uint32_t* words) {
  return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(words));
}

// words[i] for i in [first, last) from the word `from` places on.
FASTDIFF_AVX2 void renew(uint32_t* words, int first, int last, int from) {
  const __m256i upper = _mm256_set1_epi32(int(0x80000000u)), lower = _mm256_set1_epi32(0x7fffffff);
  const __m256i matrix = _mm256_set1_epi32(int(0x9908b0dfu)), one = _mm256_set1_epi32(1);
  int i = first;
  for (; i + 8 <= last; i += 8) {
    const __m256i u = load(words + i), v = load(words + i + 1);
    const __m256i mixed = _mm256_or_si256(_mm256_and_si256(u, upper), _mm256_and_si256(v, lower));
    const __m256i odd = _mm256_cmpeq_epi32(_mm256_and_si256(v, one), one);
    const __m256i twisted = _mm256_xor_si256(_mm256_srli_epi32(mixed, 1), _mm256_and_si256(odd, matrix));
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(words + i), _mm256_xor_si256(load(words + i + from), twisted));
  }
  for (; i < last; ++i) words[i] = words[i + from] ^ twist(words[i], words[i + 1]);
}

struct Twister {
  uint32_t words[kWords + 8];
  int64_t left, next;
};

uint32_t tempered(uint32_t y) {
  y ^= y >> 11;
  y ^= (y << 7) & 0x9d2c5680u;
  y ^= (y << 15) & 0xefc60000u;
  return y ^ (y >> 18);
}

// Uniform numbers in [0, 1) of 24 bits.
FASTDIFF_AVX2 void uniform(Twister& twister, float* out, int64_t n) {
  const __m256i mask = _mm256_set1_epi32(0xffffff);
  while (n > 0) {
    if (twister.left == 1) {
      uint32_t* words = twister.words;
      renew(words, 0, kWords - kShift, kShift);
      renew(words, kWords - kShift, kWords - 1, kShift - kWords);
      words[kWords - 1] = words[kShift - 1] ^ twist(words[kWords - 1], words[0]);
      twister.left = kWords + 1;
      twister.next = 0;
    }
    const int64_t count = twister.left - 1 < n ? twister.left - 1 : n;
    const uint32_t* words = twister.words + twister.next;
    int64_t i = 0;
    for (; i + 8 <= count; i += 8) {
      __m256i y = load(words + i);
      y = _mm256_xor_si256(y, _mm256_srli_epi32(y, 11));
      y = _mm256_xor_si256(y, _mm256_and_si256(_mm256_slli_epi32(y, 7), _mm256_set1_epi32(int(0x9d2c5680u))));
      y = _mm256_xor_si256(y, _mm256_and_si256(_mm256_slli_epi32(y, 15), _mm256_set1_epi32(int(0xefc60000u))));
      y = _mm256_xor_si256(y, _mm256_srli_epi32(y, 18));
      const __m256 number = _mm256_cvtepi32_ps(_mm256_and_si256(y, mask));
      _mm256_storeu_ps(out + i, _mm256_mul_ps(number, _mm256_set1_ps(0x1p-24f)));
    }
    for (; i < count; ++i) out[i] = float(tempered(words[i]) & 0xffffffu) * 0x1p-24f;
    twister.next += count;
    twister.left -= count;
    out += count;
    n -= count;
  }
}

FASTDIFF_AVX2 __m256 constant(float value) { return _mm256_set1_ps(value); }

// The logarithm of normal numbers above 0.
FASTDIFF_AVX2 __m256 logarithm(__m256 x) {
  const __m256i bits = _mm256_castps_si256(x);
  __m256 e = _mm256_cvtepi32_ps(_mm256_sub_epi32(_mm256_srli_epi32(bits, 23), _mm256_set1_epi32(126)));
  x = _mm256_castsi256_ps(
      _mm256_or_si256(_mm256_and_si256(bits, _mm256_set1_epi32(0x007fffff)), _mm256_set1_epi32(0x3f000000)));
  const __m256 small = _mm256_cmp_ps(x, constant(0.707106781186547524f), _CMP_LT_OS);
  e = _mm256_sub_ps(e, _mm256_and_ps(constant(1.0f), small));
  x = _mm256_add_ps(_mm256_sub_ps(x, constant(1.0f)), _mm256_and_ps(x, small));
  const __m256 z = _mm256_mul_ps(x, x);
  __m256 y = constant(7.0376836292e-2f);
  for (float c : {-1.1514610310e-1f, 1.1676998740e-1f, -1.2420140846e-1f, 1.4249322787e-1f, -1.6668057665e-1f,
                  2.0000714765e-1f, -2.4999993993e-1f, 3.3333331174e-1f}) {
    y = _mm256_fmadd_ps(y, x, constant(c));
  }
  y = _mm256_fmadd_ps(_mm256_mul_ps(y, x), z, _mm256_mul_ps(e, constant(-2.12194440e-4f)));
  y = _mm256_fnmadd_ps(z, constant(0.5f), y);
  return _mm256_fmadd_ps(e, constant(0.693359375f), _mm256_add_ps(x, y));
}

// Sine and cosine of numbers in [0, 2 pi].
FASTDIFF_AVX2 void sine_cosine(__m256 x, __m256& sine, __m256& cosine) {
  const __m256i two = _mm256_set1_epi32(2), four = _mm256_set1_epi32(4);
  __m256i octant = _mm256_cvttps_epi32(_mm256_mul_ps(x, constant(1.27323954473516f)));
  octant = _mm256_and_si256(_mm256_add_epi32(octant, _mm256_set1_epi32(1)), _mm256_set1_epi32(~1));
  const __m256 turns = _mm256_cvtepi32_ps(octant);
  const __m256i sine_sign = _mm256_slli_epi32(_mm256_and_si256(octant, four), 29);
  const __m256i cosine_sign = _mm256_slli_epi32(_mm256_andnot_si256(_mm256_sub_epi32(octant, two), four), 29);
  const __m256 plain = _mm256_castsi256_ps(_mm256_cmpeq_epi32(_mm256_and_si256(octant, two), _mm256_setzero_si256()));
  x = _mm256_fmadd_ps(turns, constant(-0.78515625f), x);
  x = _mm256_fmadd_ps(turns, constant(-2.4187564849853515625e-4f), x);
  x = _mm256_fmadd_ps(turns, constant(-3.77489497744594108e-8f), x);
  const __m256 z = _mm256_mul_ps(x, x);
  __m256 c = _mm256_fmadd_ps(constant(2.443315711809948e-5f), z, constant(-1.388731625493765e-3f));
  c = _mm256_mul_ps(_mm256_fmadd_ps(c, z, constant(4.166664568298827e-2f)), z);
  c = _mm256_add_ps(_mm256_fmsub_ps(c, z, _mm256_mul_ps(z, constant(0.5f))), constant(1.0f));
  __m256 s = _mm256_fmadd_ps(constant(-1.9515295891e-4f), z, constant(8.3321608736e-3f));
  s = _mm256_mul_ps(_mm256_fmadd_ps(s, z, constant(-1.6666654611e-1f)), z);
  s = _mm256_fmadd_ps(s, x, x);
  sine = _mm256_xor_ps(_mm256_blendv_ps(c, s, plain), _mm256_castsi256_ps(sine_sign));
  cosine = _mm256_xor_ps(_mm256_blendv_ps(s, c, plain), _mm256_castsi256_ps(cosine_sign));
}

// Eight pairs of uniform numbers to as many pairs of normals, in place.
FASTDIFF_AVX2 void box_muller(float* data) {
  const __m256 u = _mm256_sub_ps(constant(1.0f), _mm256_loadu_ps(data));
  const __m256 radius = _mm256_sqrt_ps(_mm256_mul_ps(constant(-2.0f), logarithm(u)));
  __m256 sine, cosine;
  sine_cosine(_mm256_mul_ps(constant(6.283185307179586f), _mm256_loadu_ps(data + 8)), sine, cosine);
  // as torch adds the mean, which makes 0 of -0
  _mm256_storeu_ps(data, _mm256_add_ps(_mm256_mul_ps(radius, cosine), _mm256_setzero_ps()));
  _mm256_storeu_ps(data + 8, _mm256_add_ps(_mm256_mul_ps(radius, sine), _mm256_setzero_ps()));
}

FASTDIFF_AVX2 void fill(Twister& twister, float* data, int64_t n) {
  uniform(twister, data, n);
  for (int64_t i = 0; i + 16 <= n; i += 16) box_muller(data + i);
  if (n % 16 != 0) {  // torch draws the last sixteen once more
    uniform(twister, data + n - 16, 16);
    box_muller(data + n - 16);
  }
}
#else
bool supported() { return false; }
#endif

void torch_normal(torch::stable::Tensor out, torch::stable::Tensor state) {
  using torch::headeronly::ScalarType;
  STD_TORCH_CHECK(out.scalar_type() == ScalarType::Float && out.is_contiguous() && out.numel() >= 16,
                  "fastdiff: out: expected at least 16 contiguous float32 numbers");
  STD_TORCH_CHECK(state.scalar_type() == ScalarType::Byte && state.is_contiguous() && state.numel() == kBytes,
                  "fastdiff: state: expected that of a torch.Generator of the CPU");
  STD_TORCH_CHECK(supported(), "fastdiff: torch_normal: expected a CPU with AVX2 and FMA");
#if defined(__x86_64__)
  auto* bytes = static_cast<unsigned char*>(state.data_ptr());
  Twister twister;
  int32_t left;
  uint64_t next, words[kWords];
  std::memcpy(&left, bytes + kLeft, sizeof left);
  std::memcpy(&next, bytes + kNext, sizeof next);
  std::memcpy(words, bytes + kState, sizeof words);
  STD_TORCH_CHECK(left >= 1 && left <= kWords && next <= kWords && (left == 1 || left + int64_t(next) <= kWords + 1),
                  "fastdiff: state: not one of a torch.Generator");
  for (int i = 0; i < kWords; ++i) twister.words[i] = uint32_t(words[i]);
  twister.left = left;
  twister.next = int64_t(next);
  fill(twister, static_cast<float*>(out.data_ptr()), out.numel());
  left = int32_t(twister.left);
  next = uint64_t(twister.next);
  for (int i = 0; i < kWords; ++i) words[i] = twister.words[i];
  std::memcpy(bytes + kLeft, &left, sizeof left);
  std::memcpy(bytes + kNext, &next, sizeof next);
  std::memcpy(bytes + kState, words, sizeof words);
#endif
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(fastdiff, CPU, m) { m.impl("torch_normal", TORCH_BOX(&torch_normal)); }

}  // namespace fastdiff
