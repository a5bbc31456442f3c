// Plain passes over memory: what a processor moves at best with a given mix of reads and writes. They do next to no arithmetic.
// Compiled on the machine that is measured (-march=native). Pointers are 64-byte aligned, n is a multiple of 16.
#include <cstdint>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace {

typedef float Vec __attribute__((vector_size(64), may_alias));
constexpr int64_t kLanes = 16;
constexpr int64_t kChunk = 65536;          // floats that a thread takes at a time
constexpr int64_t kPrefetchFloats = 1024;  // 4 KiB ahead crosses page borders, where the hardware prefetcher stops

enum Flags { kPrefetch = 1, kDynamic = 2, kStreamWrites = 4, kStreamUpdates = 8 };

inline void put(float* to, Vec value, bool streaming) {
  if (!streaming) {
    *reinterpret_cast<Vec*>(to) = value;
    return;
  }
#if defined(__AVX512F__)
  _mm512_stream_ps(to, reinterpret_cast<__m512&>(value));
#elif defined(__AVX__)
  for (int i = 0; i < 2; ++i) _mm256_stream_ps(to + 8 * i, reinterpret_cast<__m256*>(&value)[i]);
#elif defined(__SSE2__)
  for (int i = 0; i < 4; ++i) _mm_stream_ps(to + 4 * i, reinterpret_cast<__m128*>(&value)[i]);
#else
  *reinterpret_cast<Vec*>(to) = value;
#endif
}

inline void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

template <class Body>
void for_each_chunk(int64_t n, int threads, int flags, Body body) {
  const int64_t chunks = (n + kChunk - 1) / kChunk;
  const auto run = [&](int64_t c) { body(c * kChunk, (c + 1) * kChunk < n ? (c + 1) * kChunk : n); };
  if (flags & kDynamic) {
#pragma omp parallel for schedule(dynamic, 1) num_threads(threads)
    for (int64_t c = 0; c < chunks; ++c) run(c);
  } else {
#pragma omp parallel for schedule(static) num_threads(threads)
    for (int64_t c = 0; c < chunks; ++c) run(c);
  }
}

template <int kReads, int kUpdates, int kWrites, bool kAhead, bool kStreamW, bool kStreamU>
void mix_chunk(float* const* lists, int64_t begin, int64_t end) {
  float* const* reads = lists;
  float* const* updates = lists + kReads;
  [[maybe_unused]] float* out = kWrites == 1 ? lists[kReads + kUpdates] : nullptr;
#pragma GCC unroll 4
  for (int64_t i = begin; i < end; i += kLanes) {
    if constexpr (kAhead) {
      for (int j = 0; j < kReads + kUpdates; ++j) __builtin_prefetch(lists[j] + i + kPrefetchFloats);
    }
    Vec sum = Vec{} + 0.5f;  // with nothing to read, updates stay where they are: halved again and again they would become denormal
    if constexpr (kReads > 0) sum = *reinterpret_cast<const Vec*>(reads[0] + i);
    for (int j = 1; j < kReads; ++j) sum += *reinterpret_cast<const Vec*>(reads[j] + i);
    Vec result = sum;
    for (int j = 0; j < kUpdates; ++j) {
      const Vec old = *reinterpret_cast<const Vec*>(updates[j] + i);
      put(updates[j] + i, (old + sum) * 0.5f, kStreamU);  // stays finite however often it runs
      result += old;
    }
    if constexpr (kWrites == 1) put(out + i, result, kStreamW);
  }
  fence();
}

template <int kReads, int kUpdates, int kWrites, bool kAhead, bool kStreamW>
void mix_updates(float* const* lists, int64_t n, int threads, int flags) {
  for_each_chunk(n, threads, flags, [&](int64_t begin, int64_t end) {
    flags& kStreamUpdates ? mix_chunk<kReads, kUpdates, kWrites, kAhead, kStreamW, true>(lists, begin, end)
                          : mix_chunk<kReads, kUpdates, kWrites, kAhead, kStreamW, false>(lists, begin, end);
  });
}

template <int kReads, int kUpdates, int kWrites>
void mix(float* const* lists, int64_t n, int threads, int flags) {
  if (flags & kPrefetch) {
    flags& kStreamWrites ? mix_updates<kReads, kUpdates, kWrites, true, true>(lists, n, threads, flags)
                         : mix_updates<kReads, kUpdates, kWrites, true, false>(lists, n, threads, flags);
  } else {
    flags& kStreamWrites ? mix_updates<kReads, kUpdates, kWrites, false, true>(lists, n, threads, flags)
                         : mix_updates<kReads, kUpdates, kWrites, false, false>(lists, n, threads, flags);
  }
}

// As mix_chunk, for lists of 2-byte elements (i counts their floats) beside lists of 4-byte elements, which are twice as long.
template <int kNarrow, int kWide, int kUpdates, bool kAhead, bool kStreamW, bool kStreamU>
void widths_chunk(float* const* lists, int64_t begin, int64_t end) {
  float* const* wide = lists + kNarrow;
  float* const* updates = wide + kWide;
  float* out = updates[kUpdates];
#pragma GCC unroll 2
  for (int64_t i = begin; i < end; i += kLanes) {
    if constexpr (kAhead) {
      for (int j = 0; j < kNarrow; ++j) __builtin_prefetch(lists[j] + i + kPrefetchFloats);
      for (int j = 0; j < kWide + kUpdates; ++j) {
        __builtin_prefetch(wide[j] + 2 * i + kPrefetchFloats);
        __builtin_prefetch(wide[j] + 2 * i + kLanes + kPrefetchFloats);
      }
    }
    Vec sum = Vec{} + 0.5f;
    for (int j = 0; j < kNarrow; ++j) sum += *reinterpret_cast<const Vec*>(lists[j] + i);
    Vec result = sum;
    for (int half = 0; half < 2; ++half) {
      const int64_t at = 2 * i + half * kLanes;
      for (int j = 0; j < kWide; ++j) result += *reinterpret_cast<const Vec*>(wide[j] + at);
      for (int j = 0; j < kUpdates; ++j) {
        const Vec old = *reinterpret_cast<const Vec*>(updates[j] + at);
        put(updates[j] + at, (old + sum) * 0.5f, kStreamU);
        result += old;
      }
    }
    put(out + i, result, kStreamW);
  }
  fence();
}

template <int kNarrow, int kWide, int kUpdates, bool kAhead, bool kStreamW>
void widths_updates(float* const* lists, int64_t n, int threads, int flags) {
  for_each_chunk(n, threads, flags, [&](int64_t begin, int64_t end) {
    flags& kStreamUpdates ? widths_chunk<kNarrow, kWide, kUpdates, kAhead, kStreamW, true>(lists, begin, end)
                          : widths_chunk<kNarrow, kWide, kUpdates, kAhead, kStreamW, false>(lists, begin, end);
  });
}

template <int kNarrow, int kWide, int kUpdates>
void widths(float* const* lists, int64_t n, int threads, int flags) {
  if (flags & kPrefetch) {
    flags& kStreamWrites ? widths_updates<kNarrow, kWide, kUpdates, true, true>(lists, n, threads, flags)
                         : widths_updates<kNarrow, kWide, kUpdates, true, false>(lists, n, threads, flags);
  } else {
    flags& kStreamWrites ? widths_updates<kNarrow, kWide, kUpdates, false, true>(lists, n, threads, flags)
                         : widths_updates<kNarrow, kWide, kUpdates, false, false>(lists, n, threads, flags);
  }
}

template <bool kAhead>
float sum_chunk(const float* in, int64_t begin, int64_t end) {
  Vec sums[8] = {};  // independent additions, to hide their latency
  int64_t i = begin;
  for (; i + 8 * kLanes <= end; i += 8 * kLanes) {
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) {
      if constexpr (kAhead) __builtin_prefetch(in + i + j * kLanes + kPrefetchFloats);
      sums[j] += *reinterpret_cast<const Vec*>(in + i + j * kLanes);
    }
  }
  for (; i < end; i += kLanes) sums[0] += *reinterpret_cast<const Vec*>(in + i);
  float total = 0;
  for (const Vec& sum : sums) {
    for (int lane = 0; lane < kLanes; ++lane) total += sum[lane];
  }
  return total;
}

}  // namespace

// Reads n floats: 4 n bytes.
extern "C" float read_sum(const float* in, int64_t n, int threads, int flags) {
  float total = 0;
  for_each_chunk(n, threads, flags, [&](int64_t begin, int64_t end) {
    const float sum = flags & kPrefetch ? sum_chunk<true>(in, begin, end) : sum_chunk<false>(in, begin, end);
#pragma omp atomic
    total += sum;
  });
  return total;
}

// One pass over lists = {reads..., updates..., at most one write}, n floats each: 4 n (reads + 2 updates + writes) bytes. Returns 0, or 1
// for a mix that is not here.
extern "C" int mix_pass(float* const* lists, int reads, int updates, int writes, int64_t n, int threads, int flags) {
  switch (100 * reads + 10 * updates + writes) {
    case 101: mix<1, 0, 1>(lists, n, threads, flags); break;
    case 10: mix<0, 1, 0>(lists, n, threads, flags); break;
    case 11: mix<0, 1, 1>(lists, n, threads, flags); break;
    case 110: mix<1, 1, 0>(lists, n, threads, flags); break;
    case 111: mix<1, 1, 1>(lists, n, threads, flags); break;
    case 120: mix<1, 2, 0>(lists, n, threads, flags); break;
    case 121: mix<1, 2, 1>(lists, n, threads, flags); break;
    case 131: mix<1, 3, 1>(lists, n, threads, flags); break;
    case 201: mix<2, 0, 1>(lists, n, threads, flags); break;
    case 210: mix<2, 1, 0>(lists, n, threads, flags); break;
    case 211: mix<2, 1, 1>(lists, n, threads, flags); break;
    case 221: mix<2, 2, 1>(lists, n, threads, flags); break;
    default: return 1;
  }
  return 0;
}

// One pass over lists = {narrow reads..., wide reads..., wide updates..., a narrow write}: n floats in each narrow list, 2 n in each wide
// one, 4 n (narrow + 2 wide + 4 updates + 1) bytes. Returns 0, or 1 for a mix that is not here.
extern "C" int widths_pass(float* const* lists, int narrow, int wide, int updates, int64_t n, int threads, int flags) {
  switch (100 * narrow + 10 * wide + updates) {
    case 10: widths<0, 1, 0>(lists, n, threads, flags); break;
    case 110: widths<1, 1, 0>(lists, n, threads, flags); break;
    case 102: widths<1, 0, 2>(lists, n, threads, flags); break;
    case 103: widths<1, 0, 3>(lists, n, threads, flags); break;
    default: return 1;
  }
  return 0;
}
