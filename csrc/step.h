// One sampler step: the row of coefficients and the arithmetic, written once for every backend.
//
//   m  = mu + w*(mc - mu)                               with guidance
//   x0 = clip((px*x + pm*m) / pd)                       predicted x0
//   e  = m  |  (gx*x - g0*x0) / gd  |  (ex*x + em*m) / gd    eps
//   x' = ((a0*x0 + ax*x) + ae*e) + s*z
//
// Multiplies, additions and divisions are rounded one by one in this order (build with -ffp-contract=off), so that
// eager PyTorch gives the same bits. Which terms exist is the table's structure, the Flag bits below; a term that is
// absent is skipped, a coefficient that happens to be 0 is multiplied like any other. Host and device, no torch.
//
// The backward is a closed form of the same kind: from the gradients g of x' and h of the second output, the gradients
// of x, m, z and the variance half, again one rounded operation after the other in one fixed order. What it does not
// need it does not read: x and m only to know where the clip cut (masks_clip), z and the variance half only for a
// learned variance. What is done to N elements is a function of arrays of N, stage by stage, so that where the flags
// are known at run time only, each is tested once for all N.
//
// The gradients of the row itself and of the guidance scale are sums over a sample, and so is the distance of x' from
// its mean. Such a sum is a balanced binary tree over logical indices: neighbours are added, then neighbours of their
// sums, as if zeros filled the sample up to a power of two. So aligned blocks of a power of two (kLeaf) are summed
// apart and combined by the same rule, with the same bits whatever the layout, the batch or the threads.
#pragma once

#include "philox.h"

namespace fastdiff {

// The columns of a row, in the order of fastdiff.tables.COLUMNS.
enum Column : int {
  kPx,
  kPm,
  kPd,
  kGx,
  kG0,
  kGd,
  kEx,
  kEm,
  kA0,
  kAx,
  kAe,
  kS,
  kLo,
  kHi,
  kMinLog,
  kMaxLog,
  kT,
  kRepeat,
  kColumns
};

// What a backward sums for each sample: the gradients of the columns, then that of the guidance scale.
constexpr int kGuidance = kColumns;
constexpr int kSums = kColumns + 1;
constexpr int kLeaf = 512;  // elements of a sample that kernels sum at a time

// The structure of a table (fastdiff.tables.Structure.flags) and, from bit 12 on, what a call adds to it.
enum Flag : int {
  kX0FromX = 1 << 0,   // x0 = px*x + pm*m; absent: x0 = m
  kX0Divide = 1 << 1,  // ... / pd
  kClip = 1 << 2,
  kEpsRederived = 1 << 3,  // e = gx*x - g0*x0
  kEpsLinear = 1 << 4,     // e = ex*x + em*m; neither: e = m
  kEpsDivide = 1 << 5,     // ... / gd
  kHasA0 = 1 << 6,
  kHasAx = 1 << 7,
  kHasAe = 1 << 8,
  kVarianceShift = 9,  // three bits, a Variance
  kHostRounding = 1 << 12,
  kSecondShift = 13,           // two bits, a Second
  kDomainShift = 15,           // two bits, a NoiseDomain
  kStraightThrough = 1 << 17,  // backward: the clip passes every gradient
  kScalars = 1 << 18,          // divisors come as reciprocals, multipliers are not rounded to the state's dtype
  kPastCache = 1 << 19,        // the CPU: the result goes to memory past the caches
};

enum class Variance : int { kNone, kFixed, kLearnedLog, kLearnedRange, kLearnedPlain };
enum class Second : int { kX0, kNoise, kVelocity };

FASTDIFF_HD Variance variance_of(int flags) { return Variance((flags >> kVarianceShift) & 7); }
FASTDIFF_HD Second second_of(int flags) { return Second((flags >> kSecondShift) & 3); }
FASTDIFF_HD bool is_learned(Variance v) { return int(v) >= int(Variance::kLearnedLog); }

template <class T>
struct Row {
  T px, pm, pd, gx, g0, gd, ex, em, a0, ax, ae, s, lo, hi, min_log, max_log;
  uint32_t t, repeat;
};

// Rounding policies: how an intermediate is rounded before it is used again.
struct KeepPrecision {
  template <class T>
  FASTDIFF_HD T operator()(T v) const {
    return v;
  }
};

// Half states under a host's rule: eager code rounds every intermediate to the state's dtype.
template <class Half>
struct RoundTo {
  FASTDIFF_HD float operator()(float v) const { return Half::load(Half::store(v)); }
};

// Multipliers take the rounding of the state, divisors stay in the precision of the table: what PyTorch does with a
// half tensor and a float32 scalar tensor on a CPU. (A CUDA tensor it multiplies by a scalar as it is, and divides by
// one by multiplying with its reciprocal: kScalars. The bounds of a clip are as good as rounded: the result is.)
template <class T, class Round>
FASTDIFF_HD Row<T> load_row(const T* c, int flags, Round rnd) {
  const auto factor = [&](int column) { return flags & kScalars ? c[column] : rnd(c[column]); };
  return Row<T>{factor(kPx),
                factor(kPm),
                c[kPd],
                factor(kGx),
                factor(kG0),
                c[kGd],
                factor(kEx),
                factor(kEm),
                factor(kA0),
                factor(kAx),
                factor(kAe),
                factor(kS),
                rnd(c[kLo]),
                rnd(c[kHi]),
                factor(kMinLog),
                factor(kMaxLog),
                uint32_t(int64_t(c[kT])),
                uint32_t(int64_t(c[kRepeat]))};
}

// Flags known to the compiler, so that a loop over elements has no branch left, or known at run time.
template <int kValue>
struct StaticFlags {
  static constexpr int value = kValue;
  FASTDIFF_HD constexpr bool has(int bit) const { return (kValue & bit) != 0; }
};
struct RuntimeFlags {
  int value;
  FASTDIFF_HD bool has(int bit) const { return (value & bit) != 0; }
};
// Known at run time, but among these at most.
template <int kPossible>
struct SomeFlags {
  int value;
  FASTDIFF_HD bool has(int bit) const { return (kPossible & bit) != 0 && (value & bit) != 0; }
};

template <class T, class Flags>
FASTDIFF_HD T divide(Flags f, T a, T divisor) {
  return f.has(kScalars) ? a * divisor : a / divisor;
}

// torch.clamp: NaN passes.
template <class T>
FASTDIFF_HD T clamp(T v, T lo, T hi) {
  v = v < lo ? lo : v;
  return v > hi ? hi : v;
}

template <class T, class Round>
FASTDIFF_HD T guide(Round rnd, T cond, T uncond, T scale) {
  return rnd(uncond + rnd(scale * rnd(cond - uncond)));
}

// x0 before its division.
template <int N, class T, class Flags, class Round>
FASTDIFF_HD void combine_x0(const Row<T>& r, Flags f, Round rnd, const T (&x)[N], const T (&m)[N], T (&x0)[N]) {
  FASTDIFF_UNROLL
  for (int i = 0; i < N; ++i) x0[i] = m[i];
  if (f.has(kX0FromX)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) x0[i] = rnd(rnd(r.px * x[i]) + rnd(r.pm * m[i]));
  }
}

// x0 before the clip.
template <int N, class T, class Flags, class Round>
FASTDIFF_HD void predict_x0(const Row<T>& r, Flags f, Round rnd, const T (&x)[N], const T (&m)[N], T (&x0)[N]) {
  combine_x0(r, f, rnd, x, m, x0);
  if (f.has(kX0Divide)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) x0[i] = rnd(divide(f, x0[i], r.pd));
  }
}

// eps before its division. x0: after the clip.
template <int N, class T, class Flags, class Round>
FASTDIFF_HD void combine_eps(const Row<T>& r, Flags f, Round rnd, const T (&x)[N], const T (&m)[N], const T (&x0)[N],
                             T (&e)[N]) {
  FASTDIFF_UNROLL
  for (int i = 0; i < N; ++i) e[i] = m[i];
  if (f.has(kEpsRederived)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) e[i] = rnd(rnd(r.gx * x[i]) - rnd(r.g0 * x0[i]));
  } else if (f.has(kEpsLinear)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) e[i] = rnd(rnd(r.ex * x[i]) + rnd(r.em * m[i]));
  }
}

// x' and x0 of N elements. sz = s*z (or (s*std)*z), used when has_noise.
template <int N, class T, class Flags, class Round>
FASTDIFF_HD void step_elements(const Row<T>& r, Flags f, Round rnd, bool has_noise, const T (&x)[N], const T (&m)[N],
                               const T (&sz)[N], T (&out)[N], T (&x0)[N]) {
  predict_x0(r, f, rnd, x, m, x0);
  if (f.has(kClip)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) x0[i] = clamp(x0[i], r.lo, r.hi);
  }

  bool empty = true;
  const auto add = [&](const T(&term)[N]) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) out[i] = empty ? term[i] : rnd(out[i] + term[i]);
    empty = false;
  };
  T term[N];
  if (f.has(kHasA0)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) term[i] = rnd(r.a0 * x0[i]);
    add(term);
  }
  if (f.has(kHasAx)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) term[i] = rnd(r.ax * x[i]);
    add(term);
  }
  if (f.has(kHasAe)) {
    T e[N];
    combine_eps(r, f, rnd, x, m, x0, e);
    if (f.has(kEpsDivide)) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) e[i] = rnd(divide(f, e[i], r.gd));
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) term[i] = rnd(r.ae * e[i]);
    add(term);
  }
  if (has_noise) add(sz);
}

// The standard deviation of a Gaussian density, which may be told to be no smaller than min_std.
template <class T>
FASTDIFF_HD T at_least(T s, T min_std) {
  return s < min_std ? min_std : s;
}

// How many standard deviations x' is from its mean, the step without noise; NaN where there is no density.
template <class T>
FASTDIFF_HD T deviation(T x_prev, T mean, T sd) {
  return sd == T(0) ? T(__builtin_nanf("")) : (x_prev - mean) / sd;
}

// exp(x) by a fixed polynomial: the same bits everywhere, at most 1 ulp from exact. Subnormal results are scaled in
// two exact steps; NaN stays NaN, overflow gives Inf.
FASTDIFF_HD float exp_fixed(float x) {
  const float clamped = clamp(x, -104.0f, 89.0f);
  const float k = (clamped * 0x1.715476p+0f + 0x1.8p+23f) - 0x1.8p+23f;
  float f = fma_exact(k, -0x1.62E400p-1f, clamped);
  f = fma_exact(k, -0x1.7F7D1Cp-20f, f);
  float p = 0x1.6A4F88p-10f;
  p = fma_exact(p, f, 0x1.123988p-7f);
  p = fma_exact(p, f, 0x1.5558AEp-5f);
  p = fma_exact(p, f, 0x1.555492p-3f);
  p = fma_exact(p, f, 0x1.FFFFFCp-2f);
  p = fma_exact(p, f, 1.0f);
  p = fma_exact(p, f, 1.0f);
  const int32_t n = k == k ? int32_t(k) : 0;
  const int32_t half = n >> 1;
  return (p * bit_cast<float>((half + 127) << 23)) * bit_cast<float>((n - half + 127) << 23);
}

FASTDIFF_HD double exp_fixed(double x) {
  const double clamped = clamp(x, -746.0, 710.0);
  const double k = (clamped * 0x1.71547652B82FEp+0 + 0x1.8p+52) - 0x1.8p+52;
  // ln 2 in two parts; the first has 21 trailing zeros, so its product with k is exact.
  const double major = clamped - k * 0x1.62E42FEE00000p-1, minor = k * 0x1.A39EF35793C76p-33;
  const double f = major - minor;
  double p = 0x1.6124613A86D09p-33;  // 1/13!, ..., 1/2!: Taylor on |f| <= ln(2)/2
  p = p * f + 0x1.1EED8EFF8D898p-29;
  p = p * f + 0x1.AE64567F544E4p-26;
  p = p * f + 0x1.27E4FB7789F5Cp-22;
  p = p * f + 0x1.71DE3A556C734p-19;
  p = p * f + 0x1.A01A01A01A01Ap-16;
  p = p * f + 0x1.A01A01A01A01Ap-13;
  p = p * f + 0x1.6C16C16C16C17p-10;
  p = p * f + 0x1.1111111111111p-7;
  p = p * f + 0x1.5555555555555p-5;
  p = p * f + 0x1.5555555555555p-3;
  p = p * f + 0.5;
  p = (major + (f * f * p - minor)) + 1.0;  // few roundings of the large terms
  const int64_t n = k == k ? int64_t(k) : 0;
  const int64_t half = n >> 1;
  return (p * bit_cast<double>((half + 1023) << 52)) * bit_cast<double>((n - half + 1023) << 52);
}

FASTDIFF_HD float sqrt_exact_of(float v) { return sqrt_exact(v); }
FASTDIFF_HD double sqrt_exact_of(double v) {
#if defined(__CUDA_ARCH__)
  return __dsqrt_rn(v);
#else
  return __builtin_sqrt(v);
#endif
}

// Where a learned variance lies between its bounds, for v in [-1, 1].
template <class T, class Round>
FASTDIFF_HD T range_fraction(Round rnd, T v) {
  return rnd(rnd(v + T(1)) * T(0.5));
}

// The standard deviation of one element from the learned half of the model output. log: Nichol & Dhariwal 2021
// (2102.09672) keep the log-variance; range: eq. 15 there, v in [-1, 1] interpolates between min_log and max_log;
// plain: a variance.
template <class T, class Round>
FASTDIFF_HD T learned_std(const Row<T>& r, Variance kind, Round rnd, T v) {
  if (kind == Variance::kLearnedPlain) return rnd(sqrt_exact_of(v));
  T log_variance = v;
  if (kind == Variance::kLearnedRange) {
    const T fraction = range_fraction(rnd, v);
    log_variance = rnd(rnd(fraction * r.max_log) + rnd(rnd(T(1) - fraction) * r.min_log));
  }
  return rnd(exp_fixed(rnd(T(0.5) * log_variance)));
}

template <class T, class Round>
FASTDIFF_HD T learned_scale(const Row<T>& r, Variance kind, Round rnd, T v) {
  return rnd(r.s * learned_std(r, kind, rnd, v));
}

// Whether x0 has a gradient at all, from that of x' or of the second output.
FASTDIFF_HD bool reaches_x0(int flags, bool has_grad, bool has_second) {
  const bool through_eps = (flags & kHasAe) && (flags & kEpsRederived);
  return (has_grad && ((flags & kHasA0) || through_eps)) || (has_second && second_of(flags) == Second::kX0);
}

// Whether a backward needs x0, and with it x and m.
FASTDIFF_HD bool masks_clip(int flags, bool has_grad, bool has_second) {
  return (flags & kClip) && !(flags & kStraightThrough) && reaches_x0(flags, has_grad, has_second);
}

// What step_backward_elements takes beside the gradients of the two outputs, and gives beside those of the inputs:
//   kDistance: where has_distance, the gradient grad_squares of the square of each deviation of x_prev from the mean,
//     with a standard deviation of at least min_std; x_prev itself counts as a constant.
//   kTerms: add(column, terms) takes the terms of a sum, once for each sum that has any.
struct NoExtras {
  static constexpr bool kDistance = false, kTerms = false;
};

// The terms sign*(a*b).
template <int kSign = 1, int N, class T, class Extras>
FASTDIFF_HD void add_products(Extras& extras, int column, const T (&a)[N], const T (&b)[N]) {
  T terms[N];
  FASTDIFF_UNROLL
  for (int i = 0; i < N; ++i) terms[i] = kSign > 0 ? a[i] * b[i] : -(a[i] * b[i]);
  extras.add(column, terms);
}

template <bool kFirst, class A>
FASTDIFF_HD const A& either(const A& first, const A& second) {
  return kFirst ? first : second;
}

// The gradients of N elements: of x, of m (guide_backward takes it on to the model outputs), of the variance half v and
// of the noise z. g, used when has_grad: the gradient of x'. h, used when has_second: that of the second output. x, m
// (after guidance): used where masks_clip, and for extras. v, z: used for a learned variance, z for terms too. The
// coefficients are those of the forward, and rnd only serves to see x0, std and z as the forward saw them: no gradient
// is rounded in between. At a bound of the clip, and for NaN, the gradient passes.
template <int N, class T, class Flags, class Round, class Extras>
FASTDIFF_HD void step_backward_elements(const Row<T>& r, Flags f, Round rnd, bool has_grad, bool has_second,
                                        const T (&g)[N], const T (&h)[N], const T (&x)[N], const T (&m)[N],
                                        const T (&v)[N], const T (&z)[N], T (&dx)[N], T (&dm)[N], T (&dv)[N],
                                        T (&dz)[N], [[maybe_unused]] Extras& extras) {
  constexpr bool kTerms = Extras::kTerms;
  T d0[N];
  FASTDIFF_UNROLL
  for (int i = 0; i < N; ++i) d0[i] = dx[i] = dm[i] = dv[i] = dz[i] = T(0);

  // the gradient of the mean: g, and what the distance adds to it
  [[maybe_unused]] T sum[N], of_distance[N];
  bool has_mean = has_grad;
  if constexpr (Extras::kDistance) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) sum[i] = g[i];
    if (extras.has_distance) {
      T mean[N], unused[N];
      step_elements(r, f, rnd, false, x, m, x, mean, unused);
      const T sd = at_least(r.s, extras.min_std);
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) {
        const T away = deviation(extras.x_prev[i], mean[i], sd), weight = T(-2) * extras.grad_squares[i];
        sum[i] = has_grad ? g[i] + (weight * away) / sd : (weight * away) / sd;
        if (kTerms) of_distance[i] = r.s < extras.min_std ? T(0) : (weight * (away * away)) / sd;
      }
      has_mean = true;
    }
  }
  const T(&gm)[N] = either<Extras::kDistance>(sum, g);

  // x0 before the clip and after it, as the terms need them
  [[maybe_unused]] T raw[N], x0[N], terms[N], of_s[N];
  [[maybe_unused]] bool has_s = false;
  if constexpr (kTerms) {
    predict_x0(r, f, rnd, x, m, raw);
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) x0[i] = raw[i];
    if (f.has(kClip)) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) x0[i] = clamp(raw[i], r.lo, r.hi);
    }
  }

  const Variance variance = variance_of(f.value);
  const bool has_velocity = has_second && second_of(f.value) == Second::kVelocity;
  if (has_mean) {
    if (f.has(kHasA0)) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) d0[i] = r.a0 * gm[i];
      if constexpr (kTerms) add_products(extras, kA0, gm, x0);
    }
    if (f.has(kHasAx)) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) dx[i] = r.ax * gm[i];
    }
  }
  if constexpr (kTerms) {
    const bool has_ax = has_mean && f.has(kHasAx);
    if (has_ax || has_velocity) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) terms[i] = has_ax ? gm[i] * x[i] : T(0);
      if (has_velocity) {
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) terms[i] = terms[i] + h[i] * rnd(z[i]);
      }
      extras.add(kAx, terms);
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) of_s[i] = T(0);
  }
  if (has_grad) {
    if (variance == Variance::kFixed) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) dz[i] = r.s * g[i];
      if constexpr (kTerms) {
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) of_s[i] = g[i] * rnd(z[i]);
        has_s = true;
      }
    } else if (is_learned(variance)) {
      T of_log[N];
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) {
        const T std = learned_std(r, variance, rnd, v[i]);
        const T dstd = r.s * (g[i] * rnd(z[i]));
        dz[i] = rnd(r.s * std) * g[i];
        dv[i] = variance == Variance::kLearnedPlain ? (dstd * T(0.5)) / std : (dstd * std) * T(0.5);
        if (kTerms) of_s[i] = g[i] * (std * rnd(z[i]));
      }
      has_s = kTerms;
      if (variance == Variance::kLearnedRange) {
        const T slope = T(0.5) * (r.max_log - r.min_log);
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) {
          if (kTerms) of_log[i] = dv[i];
          dv[i] = dv[i] * slope;
        }
        if constexpr (kTerms) {
          FASTDIFF_UNROLL
          for (int i = 0; i < N; ++i) terms[i] = of_log[i] * range_fraction(rnd, v[i]);
          extras.add(kMaxLog, terms);
          FASTDIFF_UNROLL
          for (int i = 0; i < N; ++i) terms[i] = of_log[i] * (T(1) - range_fraction(rnd, v[i]));
          extras.add(kMinLog, terms);
        }
      }
    }
  }
  if (has_second) {
    switch (second_of(f.value)) {
      case Second::kX0:
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) d0[i] = d0[i] + h[i];
        break;
      case Second::kNoise:
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) dz[i] = dz[i] + h[i];
        break;
      case Second::kVelocity:
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) {
          dz[i] = dz[i] + r.ax * h[i];
          dx[i] = dx[i] - r.s * h[i];
        }
        break;
    }
  }
  if constexpr (kTerms) {
    if (has_velocity) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) of_s[i] = of_s[i] - h[i] * x[i];
    }
    if (extras.has_distance) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) of_s[i] = of_s[i] + of_distance[i];
    }
    if (has_s || has_velocity || extras.has_distance) extras.add(kS, of_s);
  }

  if (has_mean && f.has(kHasAe)) {
    T de[N];
    [[maybe_unused]] T e[N];
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) de[i] = r.ae * gm[i];
    if constexpr (kTerms) combine_eps(r, f, rnd, x, m, x0, e);
    if (f.has(kEpsDivide)) {
      if constexpr (kTerms) {
        if (f.has(kScalars)) add_products(extras, kGd, de, e);
        FASTDIFF_UNROLL
        for (int i = 0; i < N; ++i) e[i] = rnd(divide(f, e[i], r.gd));
      }
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) de[i] = divide(f, de[i], r.gd);
      if constexpr (kTerms) {
        if (!f.has(kScalars)) add_products<-1>(extras, kGd, de, e);
      }
    }
    if constexpr (kTerms) add_products(extras, kAe, gm, e);
    if (f.has(kEpsRederived)) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) {
        dx[i] = dx[i] + r.gx * de[i];
        d0[i] = d0[i] - r.g0 * de[i];
      }
      if constexpr (kTerms) {
        add_products(extras, kGx, de, x);
        add_products<-1>(extras, kG0, de, x0);
      }
    } else if (f.has(kEpsLinear)) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) {
        dx[i] = dx[i] + r.ex * de[i];
        dm[i] = dm[i] + r.em * de[i];
      }
      if constexpr (kTerms) {
        add_products(extras, kEx, de, x);
        add_products(extras, kEm, de, m);
      }
    } else {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) dm[i] = dm[i] + de[i];
    }
  }

  if (!reaches_x0(f.value, has_mean, has_second)) return;
  if (masks_clip(f.value, has_mean, has_second)) {
    if constexpr (kTerms) {
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) terms[i] = raw[i] < r.lo ? d0[i] : T(0);
      extras.add(kLo, terms);
      FASTDIFF_UNROLL
      for (int i = 0; i < N; ++i) terms[i] = raw[i] > r.hi ? d0[i] : T(0);
      extras.add(kHi, terms);
    } else {
      predict_x0(r, f, rnd, x, m, raw);
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) d0[i] = (raw[i] < r.lo) | (raw[i] > r.hi) ? T(0) : d0[i];
  }
  if (f.has(kX0Divide)) {
    if constexpr (kTerms) {
      if (f.has(kScalars)) {
        combine_x0(r, f, rnd, x, m, terms);
        add_products(extras, kPd, d0, terms);
      }
    }
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) d0[i] = divide(f, d0[i], r.pd);
    if constexpr (kTerms) {
      if (!f.has(kScalars)) add_products<-1>(extras, kPd, d0, raw);
    }
  }
  if (f.has(kX0FromX)) {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) {
      dx[i] = dx[i] + r.px * d0[i];
      dm[i] = dm[i] + r.pm * d0[i];
    }
    if constexpr (kTerms) {
      add_products(extras, kPx, d0, x);
      add_products(extras, kPm, d0, m);
    }
  } else {
    FASTDIFF_UNROLL
    for (int i = 0; i < N; ++i) dm[i] = dm[i] + d0[i];
  }
}

// Of m = uncond + scale*(cond - uncond).
template <class T>
FASTDIFF_HD void guide_backward(T scale, T dm, T& dcond, T& duncond) {
  dcond = scale * dm;
  duncond = dm - dcond;
}

}  // namespace fastdiff
