// The noise contract, version 1: z[b, i] = normal(seed[b], domain, t, repeat, i).
//
// Bits:    Philox4x32-10 (Salmon et al., "Parallel random numbers: as easy as 1, 2, 3", SC 2011),
//          key = the 64-bit seed (low, high), counter = (i / 4, t, domain, repeat), lane = i % 4.
// Normals: words (0, 1) and (2, 3) are Box-Muller pairs. Everything after the integers is float32 with explicit
//          fused multiply-adds and one correctly rounded square root, so every machine with IEEE arithmetic
//          gives the same bits. docs/design.md states the contract; tests/test_noise.py freezes it.
//
// Host and device, no torch. Philox is not a cryptographic generator.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define FASTDIFF_HD __host__ __device__ __forceinline__
#define FASTDIFF_UNROLL _Pragma("unroll")
#define FASTDIFF_ROLLED _Pragma("unroll 1")
#else
#define FASTDIFF_HD inline __attribute__((always_inline))
#define FASTDIFF_UNROLL _Pragma("GCC unroll 10")
#define FASTDIFF_ROLLED _Pragma("GCC unroll 1")
#endif

namespace fastdiff {

enum NoiseDomain : uint32_t { kDomainInitial = 0, kDomainStep = 1, kDomainForward = 2 };

template <class To, class From>
FASTDIFF_HD To bit_cast(From from) {
  static_assert(sizeof(To) == sizeof(From), "bit_cast needs equal sizes");
  To to;
  memcpy(&to, &from, sizeof(to));
  return to;
}

// a * b + c with one rounding, on every target.
FASTDIFF_HD float fma_exact(float a, float b, float c) {
#if defined(__CUDA_ARCH__)
  return __fmaf_rn(a, b, c);
#elif defined(__FMA__) || !defined(__x86_64__)
  return __builtin_fmaf(a, b, c);
#else
  // Without the instruction: the product of two floats is exact in double; the sum is rounded to odd there (the error
  // of the addition, recovered by two-sum, sets the last bit), after which rounding to float is the only rounding.
  const double product = static_cast<double>(a) * static_cast<double>(b);
  const double addend = c;
  const double sum = product + addend;
  const double part = sum - product;
  const double error = (product - (sum - part)) + (addend - part);
  uint64_t bits = bit_cast<uint64_t>(sum);
  const bool away = (error > 0) == (sum > 0);
  const bool inexact_even = error != 0 && (bits & 1) == 0 && error == error;
  bits += inexact_even ? (away ? uint64_t(1) : ~uint64_t(0)) : uint64_t(0);
  return static_cast<float>(bit_cast<double>(bits));
#endif
}

FASTDIFF_HD float sqrt_exact(float a) {
#if defined(__CUDA_ARCH__)
  return __fsqrt_rn(a);
#else
  return __builtin_sqrtf(a);
#endif
}

// The operations of a round on one word. step_cpu.cpp adds vectors of words: then a word is kept in a 64-bit lane,
// where the product of two 32-bit halves is one instruction, and what is left in the high half is ignored.
FASTDIFF_HD uint64_t multiply_words(uint64_t word, uint32_t factor) { return uint64_t(uint32_t(word)) * factor; }
FASTDIFF_HD uint32_t mix_words(uint64_t product, uint32_t word, uint32_t key) {
  return uint32_t(product >> 32) ^ word ^ key;
}
FASTDIFF_HD uint64_t mix_words(uint64_t product, uint64_t word, uint32_t key) { return (product >> 32) ^ word ^ key; }
FASTDIFF_HD uint32_t next_key(uint32_t key, uint32_t step) { return key + step; }

// What a round multiplies its words with, and adds to its keys for the next one.
constexpr uint32_t kFactor0 = 0xD2511F53u, kFactor1 = 0xCD9E8D57u;
constexpr uint32_t kKeyStep0 = 0x9E3779B9u, kKeyStep1 = 0xBB67AE85u;

// Rounds of Philox on a counter c. Word is uint32_t, uint64_t (the word in its low half), or a vector of those; Key is
// one for all, or a vector too, and is left as the next round needs it.
template <int kRounds, class Word, class Key>
FASTDIFF_HD void philox_rounds(Word c[4], Key& key0, Key& key1) {
  FASTDIFF_UNROLL
  for (int round = 0; round < kRounds; ++round) {
    const auto p0 = multiply_words(c[0], kFactor0);
    const auto p1 = multiply_words(c[2], kFactor1);
    c[0] = mix_words(p1, c[1], key0);
    c[1] = Word(p1);
    c[2] = mix_words(p0, c[3], key1);
    c[3] = Word(p0);
    key0 = next_key(key0, kKeyStep0);
    key1 = next_key(key1, kKeyStep1);
  }
}

// c: the counter on entry, the four random words on return.
template <class Word>
FASTDIFF_HD void philox4x32_10(Word c[4], uint64_t seed) {
  uint32_t key0 = uint32_t(seed), key1 = uint32_t(seed >> 32);
  philox_rounds<10>(c, key0, key1);
}

// From here on Word and Float are uint32_t and float, or vectors of those that convert from one (step_cpu.cpp).
FASTDIFF_HD float unsigned_to_float(uint32_t w) { return static_cast<float>(w); }
FASTDIFF_HD float signed_to_float(uint32_t w) { return static_cast<float>(static_cast<int32_t>(w)); }

// -2 ln(u) for u = w * 2^-32 + 2^-33 in (0, 1], the square of the Box-Muller radius.
template <class Float, class Word>
FASTDIFF_HD Float radius_squared(Word w) {
  const Float u = fma_exact(unsigned_to_float(w), 0x1p-32f, 0x1p-33f);
  // u = m * 2^e with m in [2/3, 4/3): centred on 1, so that nothing cancels where u is close to 1.
  const Word bits = bit_cast<Word>(u);
  const Word exponent = (bits - 0x3F2AAAABu) & 0xFF800000u;
  const Float f = bit_cast<Float>(bits - exponent) - 1.0f;
  // -2 ln(1 + f) / f, minimax on [-1/3, 1/3], relative error 2.0e-7.
  Float p = 0x1.36CF62p-2f;
  p = fma_exact(p, f, -0x1.5B71D2p-2f);
  p = fma_exact(p, f, 0x1.512784p-2f);
  p = fma_exact(p, f, -0x1.95F6D8p-2f);
  p = fma_exact(p, f, 0x1.000C36p-1f);
  p = fma_exact(p, f, -0x1.555DCEp-1f);
  p = fma_exact(p, f, 1.0f);
  p = fma_exact(p, f, -2.0f);
  // The exponent is left shifted by 23 bits; -2 ln(2) * 2^-23 undoes it.
  const Float e = signed_to_float(exponent);
  return fma_exact(f, p, e * -0x1.62E430p-23f);
}

// One Box-Muller pair from two words. The angle is pi * y, y in [-1/2, 1/2) from the low 31 bits of w1 (a shift,
// exact); the top bit turns it by half a circle, which negates both results.
template <class Float, class Word>
FASTDIFF_HD void box_muller(Word w0, Word w1, Float& z0, Float& z1) {
  const Float radius = sqrt_exact(radius_squared<Float>(w0));
  const Float signed_radius = bit_cast<Float>(bit_cast<Word>(radius) ^ (w1 & 0x80000000u));
  const Float y = signed_to_float(w1 << 1) * 0x1p-32f;
  const Float y2 = y * y;
  // cos(pi y), absolute error 6.2e-8, and sin(pi y) / y, 7.6e-9, minimax on [0, 1/2].
  Float c = 0x1.C02E20p-3f;
  c = fma_exact(c, y2, -0x1.54DCB4p+0f);
  c = fma_exact(c, y2, 0x1.03BC26p+2f);
  c = fma_exact(c, y2, -0x1.3BD39Cp+2f);
  c = fma_exact(c, y2, 0x1.FFFFFEp-1f);
  Float s = 0x1.3912A8p-4f;
  s = fma_exact(s, y2, -0x1.31FBF4p-1f);
  s = fma_exact(s, y2, 0x1.466504p+1f);
  s = fma_exact(s, y2, -0x1.4ABBA2p+2f);
  s = fma_exact(s, y2, 0x1.921FB4p+1f);
  z0 = signed_radius * c;
  z1 = signed_radius * (s * y);
}

}  // namespace fastdiff
