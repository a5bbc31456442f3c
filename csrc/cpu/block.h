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
// (measured: a read-only pass gains 20 %, flat from 2 KiB on).
constexpr int64_t kPrefetchBytes = 4096;

template <class T>
struct Buffer {
  alignas(64) T data[kBlock];
};

static inline int64_t element_size(DType dtype) { return dtype == DType::kFloat64 ? 8 : dtype == DType::kFloat32 ? 4 : 2; }

template <class T>
constexpr DType kArithmetic = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

static inline char* address(const Operand& operand, int64_t begin) {
  return static_cast<char*>(operand.data) + begin * element_size(operand.dtype);
}

// kLocality as the compiler's: 3 to every cache level, 2 to the second and beyond.
template <int kLocality = 3>
static inline void prefetch(const char* source, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(source + kPrefetchBytes + i, 0, kLocality);
}

// count elements of another dtype than T, converted into the buffer. Out of line, as narrow(): a call a block costs nothing, and the code
// of every conversion inlined into every kernel made three quarters of the time to compile and of the binary.
template <class T>
static __attribute__((noinline)) const T* widen(DType dtype, const char* source, int count, Buffer<T>& buffer) {
  Buffer<float> widened;
  float* target = widened.data;
  if constexpr (std::is_same_v<T, float>) target = buffer.data;
  switch (dtype) {
    case DType::kBFloat16: widen_bfloat16(reinterpret_cast<const uint16_t*>(source), target, count); break;
    case DType::kFloat16: widen_float16(reinterpret_cast<const uint16_t*>(source), target, count); break;
    default: std::memcpy(target, source, count * sizeof(float));  // float32, and T is double: a row with a float64 has T = double
  }
  if constexpr (std::is_same_v<T, double>) {
    for (int i = 0; i < count; ++i) buffer.data[i] = widened.data[i];
  }
  return buffer.data;
}

// count elements of the operand from begin, as T: the operand's own memory where its dtype is T, else converted into the buffer.
template <class T>
static inline const T* load(const Operand& operand, int64_t begin, int count, Buffer<T>& buffer, bool prefetches = true) {
  const char* source = address(operand, begin);
  if (prefetches) prefetch(source, count * element_size(operand.dtype));
  if (operand.dtype == kArithmetic<T>) return reinterpret_cast<const T*>(source);
  return widen(operand.dtype, source, count, buffer);
}

// Where a kernel may write count results of an operand that it also reads: its own memory where the dtype is T, else the buffer.
template <class T>
static inline T* target(const Operand& operand, int64_t begin, Buffer<T>& buffer) {
  return operand.dtype == kArithmetic<T> ? reinterpret_cast<T*>(address(operand, begin)) : buffer.data;
}

// Non-temporal stores: a write-only output would otherwise be read into the caches before it is overwritten. Every chunk that streams ends
// with stream_fence().
static inline void stream_bytes(char* destination, const char* source, int64_t bytes) {
#if defined(__AVX512F__)
  if (reinterpret_cast<uintptr_t>(destination) % 64 == 0 && bytes % 64 == 0) {
    for (int64_t i = 0; i < bytes; i += 64) {
      _mm512_stream_si512(reinterpret_cast<__m512i*>(destination + i), _mm512_loadu_si512(source + i));
    }
    return;
  }
#elif defined(__AVX__)
  if (reinterpret_cast<uintptr_t>(destination) % 32 == 0 && bytes % 32 == 0) {
    for (int64_t i = 0; i < bytes; i += 32) {
      _mm256_stream_si256(reinterpret_cast<__m256i*>(destination + i), _mm256_loadu_si256(reinterpret_cast<const __m256i*>(source + i)));
    }
    return;
  }
#elif defined(__SSE2__)
  if (reinterpret_cast<uintptr_t>(destination) % 16 == 0 && bytes % 16 == 0) {
    for (int64_t i = 0; i < bytes; i += 16) {
      _mm_stream_si128(reinterpret_cast<__m128i*>(destination + i), _mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i)));
    }
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

// Writes count values of type T as another dtype.
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
  Buffer<uint16_t> half;
  switch (dtype) {
    case DType::kBFloat16: narrow_bfloat16(source, half.data, count); break;
    case DType::kFloat16: narrow_float16(source, half.data, count); break;
    default: put_bytes(destination, source, count * int64_t{sizeof(float)}, streaming); return;
  }
  put_bytes(destination, half.data, count * int64_t{sizeof(uint16_t)}, streaming);
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

// Copies count elements bit for bit where the dtypes agree, through float64 (exact for all) where they do not.
static inline void copy(const Operand& from, const Operand& to, int64_t begin, int count, bool streaming) {
  if (from.dtype == to.dtype) {
    const char* source = address(from, begin);
    const int64_t bytes = count * element_size(from.dtype);
    prefetch(source, bytes);
    put_bytes(address(to, begin), source, bytes, streaming);
    return;
  }
  Buffer<double> buffer;
  store(to, begin, count, load(from, begin, count, buffer), streaming);
}

// Calls body(begin, count) for each block of the span.
template <class Body>
static inline void for_each_block(Span span, Body body) {
  int64_t begin = span.begin;
  for (; begin + kBlock <= span.end; begin += kBlock) body(begin, kBlock);
  if (begin < span.end) body(begin, static_cast<int>(span.end - begin));
}

// The arithmetic type of a row: double as soon as one operand is float64.
static inline bool has_float64(const Row& row) {
  const auto is_float64 = [](const Operand& operand) { return operand.data != nullptr && operand.dtype == DType::kFloat64; };
  return is_float64(row.param) || is_float64(row.grad) || is_float64(row.old_param) || is_float64(row.state[0]) || is_float64(row.state[1]);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
