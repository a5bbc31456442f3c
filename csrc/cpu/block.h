// Blocks of kBlock elements: how a kernel reads its operands in the arithmetic type and writes them back in theirs. A dtype is looked up
// once a block, so one kernel serves every mix of dtypes; an operand already in the arithmetic type is used in place, with no copy.
// Included only by files compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/formulas.h"
#include "cpu/convert.h"
#include "cpu/kernels.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace sam::cpu {
inline namespace SAM_ISA {

// Small enough that reads and streaming stores stay interleaved at the memory controller (measured: 256 is as fast as stores inside the
// loop, 1024 loses 15 %), large enough that the dtype look-up costs nothing.
constexpr int kBlock = 256;
// Bytes ahead of the block being read. Covers the latency of memory and crosses page borders, where the hardware prefetcher stops
// (measured on Intel's processors: a read-only pass gains 20 %, flat from 2 KiB on).
constexpr int64_t kPrefetchBytes = 4096;

template <class T>
struct Buffer {
  alignas(64) T data[kBlock];
};

// kLocality as the compiler's: 3 to every cache level, 2 to the second and beyond. Always inline: a call would have no effect that GCC
// knows of, and would be left out.
template <int kLocality = 3>
static SAM_INLINE void prefetch(const char* source, int64_t bytes) {
  if (!prefetches_ahead) return;
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(source + kPrefetchBytes + i, 0, kLocality);
}

// count elements of the operand from begin, as T: the operand's own memory where its dtype is T, else converted into the buffer.
template <class T>
static inline const T* load(const Operand& operand, int64_t begin, int count, Buffer<T>& buffer, bool prefetches = true) {
  const char* source = address(operand, begin);
  if (prefetches) prefetch(source, count * element_size(operand.dtype));
  if (operand.dtype == kArithmetic<T>) return reinterpret_cast<const T*>(source);
  widen(operand.dtype, source, count, buffer.data);
  return buffer.data;
}

// Where a kernel may write count results of an operand that it also reads: its own memory where the dtype is T, else the buffer.
template <class T>
static inline T* target(const Operand& operand, int64_t begin, Buffer<T>& buffer) {
  return operand.dtype == kArithmetic<T> ? reinterpret_cast<T*>(address(operand, begin)) : buffer.data;
}

#if defined(__AVX512F__)
constexpr int64_t kStreamBytes = 64;
static inline void stream_vector(char* to, const char* from) {
  _mm512_stream_si512(reinterpret_cast<__m512i*>(to), _mm512_loadu_si512(from));
}
#elif defined(__AVX__)
constexpr int64_t kStreamBytes = 32;
static inline void stream_vector(char* to, const char* from) {
  _mm256_stream_si256(reinterpret_cast<__m256i*>(to), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
}
#elif defined(__SSE2__)
constexpr int64_t kStreamBytes = 16;
static inline void stream_vector(char* to, const char* from) {
  _mm_stream_si128(reinterpret_cast<__m128i*>(to), _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)));
}
#endif

// Non-temporal stores: a write-only output would otherwise be read into the caches before it is overwritten. Every chunk that streams ends
// with stream_fence().
static inline void stream_bytes(char* destination, const char* source, int64_t bytes) {
#if defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(destination) % kStreamBytes == 0 && bytes % kStreamBytes == 0) {
    for (int64_t i = 0; i < bytes; i += kStreamBytes) stream_vector(destination + i, source + i);
    return;
  }
#endif
  std::memcpy(destination, source, static_cast<std::size_t>(bytes));
}

static inline void stream_fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

static inline void put_bytes(char* destination, const void* source, int64_t bytes, bool streaming) {
  if (streaming) {
    stream_bytes(destination, static_cast<const char*>(source), bytes);
  } else {
    std::memcpy(destination, source, static_cast<std::size_t>(bytes));
  }
}

#if defined(SAM_HAS_HALVES)
// Stores halves(i), the 16-bit elements [i, i + kHalves), as they are made, and returns how many: whole vectors.
template <class Make>
static inline int put_halves(char* destination, int count, bool streaming, Make halves) {
  int i = 0;
  if (streaming && reinterpret_cast<uintptr_t>(destination) % sizeof(Halves) == 0) {
    for (; i + kHalves <= count; i += kHalves) stream_halves(destination + 2 * i, halves(i));
  } else {
    for (; i + kHalves <= count; i += kHalves) store_halves(destination + 2 * i, halves(i));
  }
  return i;
}
#endif

// Writes count values of type T as another dtype. Out of line, as widen().
template <class T>
static __attribute__((noinline)) void narrow(DType dtype, char* destination, int count, const T* values, bool streaming) {
  Buffer<float> narrowed;
  const float* source;
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < count; ++i) narrowed.data[i] = static_cast<float>(values[i]);
    source = narrowed.data;
  } else {
    source = values;
  }
  if (dtype == DType::kFloat32) {
    put_bytes(destination, source, count * int64_t{sizeof(float)}, streaming);
    return;
  }
  int done = 0;
#if defined(SAM_HAS_HALVES)
  done = dtype == DType::kBFloat16 ? put_halves(destination, count, streaming, [&](int i) { return narrow_vector_bfloat16(source + i); })
                                   : put_halves(destination, count, streaming, [&](int i) { return narrow_vector_float16(source + i); });
#endif
  Buffer<uint16_t> half;
  dtype == DType::kBFloat16 ? narrow_bfloat16(source + done, half.data, count - done)
                            : narrow_float16(source + done, half.data, count - done);
  const int64_t size = sizeof(uint16_t);
  put_bytes(destination + done * size, half.data, (count - done) * size, streaming);
}

// Writes count values to the operand, rounding once. values may be the operand's own memory, which is then already written.
template <class T>
static inline void store(const Operand& operand, int64_t begin, int count, const T* values, bool streaming = false) {
  char* destination = address(operand, begin);
  if (operand.dtype == kArithmetic<T>) {
    if (destination != reinterpret_cast<const char*>(values)) put_bytes(destination, values, count * int64_t{sizeof(T)}, streaming);
    return;
  }
  narrow(operand.dtype, destination, count, values, streaming);
}

// Copies count elements by way of T, which is exact for both dtypes.
template <class T>
static inline void convert(const Operand& from, const Operand& to, int64_t begin, int count, bool streaming) {
  Buffer<T> buffer;
  store(to, begin, count, load(from, begin, count, buffer), streaming);
}

// Copies count elements bit for bit where the dtypes agree.
static inline void copy(const Operand& from, const Operand& to, int64_t begin, int count, bool streaming) {
  if (from.dtype == to.dtype) {
    const char* source = address(from, begin);
    const int64_t bytes = count * element_size(from.dtype);
    prefetch(source, bytes);
    put_bytes(address(to, begin), source, bytes, streaming);
    return;
  }
  const bool is_double = from.dtype == DType::kFloat64 || to.dtype == DType::kFloat64;
  is_double ? convert<double>(from, to, begin, count, streaming) : convert<float>(from, to, begin, count, streaming);
}

// Calls compute(values, result), which makes a block of the target from one of the source, another role's or its own. What was just read is
// written where it lies; a target that is only written is staged, and streamed if streams.
template <class T, class Compute>
static inline void rewrite(const Row& row, int to, int from, int64_t begin, int count, bool streams, Compute compute) {
  Buffer<T> values_buffer, result_buffer;
  const T* values = load(row[from], begin, count, values_buffer);
  T* result = from == to ? target(row[to], begin, result_buffer) : result_buffer.data;
  compute(values, result);
  store(row[to], begin, count, result, from != to && streams);
}

// param moved by scale times the step, or times T_w^2 step.
template <class T>
static inline void move_along(const T* param, const T* step, int count, T scale, const Scaling<T>& scaling, T* result) {
  if (scaling.is_adaptive) {
#pragma omp simd
    for (int i = 0; i < count; ++i) result[i] = perturb_adaptive(param[i], step[i], scale, scaling);
  } else {
#pragma omp simd
    for (int i = 0; i < count; ++i) result[i] = perturb(param[i], step[i], scale);
  }
}

// Calls body(begin, count) for each block of the span.
template <class Body>
static inline void for_each_block(Span span, Body body) {
  int64_t begin = span.begin;
  for (; begin + kBlock <= span.end; begin += kBlock) body(begin, kBlock);
  if (begin < span.end) body(begin, static_cast<int>(span.end - begin));
}

// Elements that a row with 16-bit tensors beside wider ones is best read and written in at a time, at most kBlock (measured:
// docs/internals/cpu.md).
#if defined(SAM_HAS_HALVES)
constexpr int kMixedStep = sizeof(Halves) == 64 ? 64 : 128;
#else
constexpr int kMixedStep = 64;
#endif

// Elements that a row is best read and written in at a time, at most kBlock.
static inline int step_of(const Row& row) {
  bool has_narrow = false, has_wide = false;
  for (const Operand& operand : row.operands) {
    if (operand.data != nullptr) (element_size(operand.dtype) == 2 ? has_narrow : has_wide) = true;
  }
  return has_narrow && has_wide ? kMixedStep : kBlock;
}

// Calls body(begin, count) for each step of the span.
template <class Body>
static inline void for_each_step(Span span, int step, Body body) {
  for (int64_t begin = span.begin; begin < span.end; begin += step) {
    body(begin, static_cast<int>(begin + step < span.end ? step : span.end - begin));
  }
}

// The arithmetic type of a row: double as soon as one operand is float64.
static inline bool has_float64(const Row& row) {
  for (const Operand& operand : row.operands) {
    if (operand.data != nullptr && operand.dtype == DType::kFloat64) return true;
  }
  return false;
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
