// The kernels of dynamic thresholding on a GPU, over threshold.h. No torch and no launch, so that they compile as plain
// C++ too; step_cuda.cu launches them.
//
// A block counts a level of the search in shared memory. Where it has a sample to itself, it goes on to the end. Where
// several share a sample, each level is a launch: the blocks add up what they counted, and the last one to do so takes
// the search a level further. Nothing is read back: where a sample is settled early, the launches that are left find it
// so.
#pragma once

#include "step_cuda.h"
#include "threshold.h"

namespace fastdiff {
namespace cuda {

constexpr int kSearchThreads = 512;  // of a block
constexpr int kSearchVector = 4;
constexpr int kBinsOfThread = kMostBins / kSearchThreads;

using Word = unsigned long long;  // that atomics take

// What a search is told beside its call.
template <class T>
struct SearchFor {
  Rank<T> rank;
  T max_value;
  int last_level;
};

// How far the search of a sample is.
template <class T>
struct Progress {
  Key<T> prefix;
  int64_t rank;  // among the elements that have the prefix
  bool settled;
  T bound;
};

// A sample that several blocks share; all zeros at first.
template <class T>
struct SharedSearch {
  Word counts[kMostBins];
  Word next;      // the least key with a greater prefix, as its complement
  unsigned nans;  // whether there are any
  unsigned done;  // blocks that have added what they counted
  Progress<T> progress;
};

// What a block counts of a level.
struct Counted {
  unsigned counts[kMostBins];
  Word next;  // as above
  unsigned nans;
};

// The elements of a sample, several at a time: fn(values, extent) for contiguous ones, fn(value, at) for others, where
// `at` is their place in x and in out.
template <class T, class Flat, class Strided>
FASTDIFF_DEVICE void for_each_value(const ThresholdCall& c, int64_t b, Flat flat, Strided strided) {
  const int64_t thread = int64_t(blockIdx.x) * kSearchThreads + threadIdx.x;
  const int64_t threads = int64_t(gridDim.x) * kSearchThreads;
  if (c.layout == Layout::kFlat) {
    const char* const x = c.x.data + b * c.x.batch_stride * element_size(c.x.dtype);
    const char* const out = c.out.data + b * c.out.batch_stride * element_size(c.out.dtype);
    const bool aligned = (uintptr_t(x) | uintptr_t(out)) % 16 == 0;
    for (int64_t i = thread * kSearchVector; i < c.sample; i += threads * kSearchVector) {
      const Extent e = extent_of<kSearchVector>(i, c.sample, aligned);
      T values[kSearchVector];
      load_any(values, c.x.dtype, x, e);
      flat(values, e);
    }
  } else {
    const Operand* const operands[] = {&c.x, &c.out};
    for (int64_t i = thread; i < c.sample; i += threads) {
      int64_t at[2];
      locate(c, uint64_t(i), b, operands, at);
      strided(load_one<T>(c.x, at[0]), at[1]);
    }
  }
}

// Counts what the block has of a level of sample b. All threads of the block, which wait for one another.
template <class T>
FASTDIFF_DEVICE void count_level(const ThresholdCall& c, int64_t b, int level, bool last, Key<T> prefix, Counted& to) {
  for (int bin = int(threadIdx.x); bin < kMostBins; bin += kSearchThreads) to.counts[bin] = 0;
  if (threadIdx.x == 0) to.next = to.nans = 0;
  __syncthreads();
  const int before = shift_before<T>(level), shift = shift_of<T>(level);
  const unsigned mask = unsigned(bins_of<T>(level) - 1);
  Key<T> next = kNanKey<T>;
  const auto count = [&](T value) {
    const Key<T> key = key_of(value), of_key = key >> before;
    if (key == kNanKey<T>) atomicMax(&to.nans, 1u);
    if (of_key == prefix) atomicAdd(&to.counts[unsigned(key >> shift) & mask], 1u);
    next = of_key > prefix && key < next ? key : next;
  };
  for_each_value<T>(
      c, b,
      [&](const T(&values)[kSearchVector], const Extent& e) {
        FASTDIFF_UNROLL
        for (int i = 0; i < kSearchVector; ++i) {
          if (i < e.count) count(values[i]);
        }
      },
      [&](T value, int64_t) { count(value); });
  if (last && next != kNanKey<T>) atomicMax(&to.next, ~Word(next));
  __syncthreads();
}

// What all threads of a block before this one have together.
FASTDIFF_DEVICE Word sum_before(Word own) {
  __shared__ Word of_warps[kSearchThreads / 32];
  Word before = 0, total = own;
  FASTDIFF_UNROLL
  for (int lane = 1; lane < 32; lane *= 2) {
    const Word other = __shfl_xor_sync(0xFFFFFFFFu, total, lane);
    before += threadIdx.x & unsigned(lane) ? other : 0;
    total += other;
  }
  if (threadIdx.x % 32 == 0) of_warps[threadIdx.x / 32] = total;
  __syncthreads();
  for (unsigned warp = 0; warp < threadIdx.x / 32; ++warp) before += of_warps[warp];
  __syncthreads();  // they may be written again
  return before;
}

// Takes the search of a sample a level further by the counts of its elements; `p` is shared by the block, all threads
// of which are here.
template <class T, class Count>
FASTDIFF_DEVICE void advance(const SearchFor<T>& s, int level, const Count* counts, Word next, bool nans,
                             Progress<T>& p) {
  // where a rank lies: its bin, and its rank in there; and how many elements lie before a bin
  __shared__ int bin, bin_of_next;
  __shared__ int64_t rank, at_most_one, under_max, finite;
  const int first = int(threadIdx.x) * kBinsOfThread;
  int64_t own[kBinsOfThread], total = 0;
  FASTDIFF_UNROLL
  for (int i = 0; i < kBinsOfThread; ++i) {
    own[i] = int64_t(counts[first + i]);
    total += own[i];
  }
  if (threadIdx.x == 0) {
    bin_of_next = -1;
    under_max = INT64_MAX;  // where no bin lies above
  }
  int64_t before = int64_t(sum_before(Word(total)));
  const int64_t wanted = p.rank;
  const int shift = shift_of<T>(level);
  const int one = int(key_of(T(1)) >> shift), inf = int(KeyOf<T>::kInf >> shift);
  const int above_max = int(key_of(s.max_value) >> shift) + 1;
  FASTDIFF_UNROLL
  for (int i = 0; i < kBinsOfThread; ++i) {
    if (level == 0) {
      if (first + i == one) at_most_one = before;
      if (first + i == inf) finite = before;
      if (first + i == above_max) under_max = before;
    }
    if (before <= wanted && wanted < before + own[i]) {
      bin = first + i;
      rank = wanted - before;
    }
    if (before <= wanted + 1 && wanted + 1 < before + own[i]) bin_of_next = first + i;
    before += own[i];
  }
  __syncthreads();
  if (threadIdx.x == 0) {
    const int bits = shift_before<T>(level) - shift;
    const auto with_bin = [&](int of) { return p.prefix << bits | Key<T>(of); };
    if (level == 0 && nans) {
      p.settled = true;
      p.bound = value_of<T>(kNanKey<T>);
    } else if (level == 0 && settle(s.rank, finite, at_most_one, under_max, s.max_value, p.bound)) {
      p.settled = true;
    } else if (level == s.last_level) {
      const T low = value_of<T>(with_bin(bin) << shift);
      // of the same prefix, or of a greater one
      const T after = value_of<T>(bin_of_next >= 0 ? with_bin(bin_of_next) << shift : Key<T>(~next));
      const T high = s.rank.weight > T(0) ? after : low;
      p.settled = true;
      p.bound = bound_of(interpolate(low, high, s.rank.weight), s.max_value);
    } else {
      p.prefix = with_bin(bin);
      p.rank = rank;
    }
  }
  __syncthreads();
}

template <class T>
FASTDIFF_DEVICE void apply_bound(const ThresholdCall& c, int64_t b, T bound) {
  for_each_value<T>(
      c, b,
      [&](T(&values)[kSearchVector], const Extent& e) {
        FASTDIFF_UNROLL
        for (int i = 0; i < kSearchVector; ++i) values[i] = thresholded(values[i], bound);
        store_any(values, c.out.dtype, c.out.data + b * c.out.batch_stride * element_size(c.out.dtype), e);
      },
      [&](T value, int64_t at) { store_one(c.out, at, thresholded(value, bound)); });
}

// A sample, or several one after another, in one block.
template <class T>
__global__ void __launch_bounds__(kSearchThreads, 2)
    threshold_samples(const __grid_constant__ ThresholdCall c, SearchFor<T> s) {
  __shared__ Counted counted;
  __shared__ Progress<T> progress;
  for (int64_t b = blockIdx.y; b < c.batch; b += gridDim.y) {
    if (threadIdx.x == 0) progress = {0, s.rank.below, false, T(0)};
    for (int level = 0; level <= s.last_level; ++level) {
      count_level<T>(c, b, level, level == s.last_level, level == 0 ? Key<T>(0) : progress.prefix, counted);
      advance(s, level, counted.counts, counted.next, counted.nans != 0, progress);
      if (progress.settled) break;
    }
    apply_bound(c, b, progress.bound);
    __syncthreads();  // the next sample is not to overtake
  }
}

// A level of samples that several blocks share.
template <class T>
__global__ void __launch_bounds__(kSearchThreads, 2)
    threshold_level(const __grid_constant__ ThresholdCall c, SearchFor<T> s, SharedSearch<T>* searches, int level) {
  __shared__ Counted counted;
  __shared__ Progress<T> progress;
  __shared__ bool is_last;
  const int64_t b = blockIdx.y;
  SharedSearch<T>& search = searches[b];
  if (search.progress.settled) return;
  count_level<T>(c, b, level, level == s.last_level, search.progress.prefix, counted);
  for (int bin = int(threadIdx.x); bin < kMostBins; bin += kSearchThreads) {
    if (counted.counts[bin] != 0) atomicAdd(&search.counts[bin], Word(counted.counts[bin]));
  }
  if (threadIdx.x == 0) {
    if (counted.next != 0) atomicMax(&search.next, counted.next);
    if (counted.nans != 0) atomicMax(&search.nans, 1u);
  }
  __threadfence();
  __syncthreads();
  if (threadIdx.x == 0) {
    is_last = atomicAdd(&search.done, 1u) == gridDim.x - 1;
    progress = search.progress;
    if (level == 0) progress.rank = s.rank.below;
  }
  __syncthreads();
  if (!is_last) return;
  __threadfence();
  advance(s, level, search.counts, search.next, search.nans != 0, progress);
  for (int bin = int(threadIdx.x); bin < kMostBins; bin += kSearchThreads) search.counts[bin] = 0;
  if (threadIdx.x == 0) {
    search.progress = progress;
    search.next = 0;
    search.done = 0;
  }
}

template <class T>
__global__ void __launch_bounds__(kSearchThreads, 2)
    threshold_apply(const __grid_constant__ ThresholdCall c, const SharedSearch<T>* searches) {
  apply_bound(c, int64_t(blockIdx.y), searches[blockIdx.y].progress.bound);
}

}  // namespace cuda
}  // namespace fastdiff
