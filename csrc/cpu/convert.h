// Blocks of 16-bit storage to float and back. Included only by files compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/half.h"
#include "common/operand.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace sam::cpu {

inline namespace SAM_ISA {

static inline void widen_bfloat16(const uint16_t* source, float* target, int count) {
#pragma omp simd
  for (int i = 0; i < count; ++i) target[i] = bfloat16_to_float(source[i]);
}

static inline void narrow_bfloat16(const float* source, uint16_t* target, int count) {
#pragma omp simd
  for (int i = 0; i < count; ++i) target[i] = float_to_bfloat16(source[i]);
}

static inline void widen_float16(const uint16_t* source, float* target, int count) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    _mm256_storeu_ps(target + i, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source + i))));
  }
#else
#pragma omp simd
#endif
  for (int k = i; k < count; ++k) target[k] = float16_to_float(source[k]);
}

static inline void narrow_float16(const float* source, uint16_t* target, int count) {
  int i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    const __m256 value = _mm256_loadu_ps(source + i);
    // One NaN for all, as the scalar conversion has: the instruction would keep the payload.
    const __m256 nan = _mm256_or_ps(_mm256_and_ps(value, _mm256_set1_ps(-0.0f)), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)));
    const __m256 canonical = _mm256_blendv_ps(value, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
    const __m128i half = _mm256_cvtps_ph(canonical, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(target + i), half);
  }
#else
#pragma omp simd
#endif
  for (int k = i; k < count; ++k) target[k] = float_to_float16(source[k]);
}

template <class T>
constexpr DType kArithmetic = std::is_same_v<T, double> ? DType::kFloat64 : DType::kFloat32;

// count elements to the arithmetic type. Out of line: a call a block costs nothing, and the code of every conversion inlined into every
// kernel made three quarters of the time to compile and of the binary. A row with a float64 is never widened to float.
static __attribute__((noinline)) void widen(DType dtype, const char* source, int64_t count, float* target) {
  switch (dtype) {
    case DType::kBFloat16: widen_bfloat16(reinterpret_cast<const uint16_t*>(source), target, static_cast<int>(count)); break;
    case DType::kFloat16: widen_float16(reinterpret_cast<const uint16_t*>(source), target, static_cast<int>(count)); break;
    default: std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(float));
  }
}

static __attribute__((noinline)) void widen(DType dtype, const char* source, int64_t count, double* target) {
  if (dtype == DType::kFloat64) {
    std::memcpy(target, source, static_cast<std::size_t>(count) * sizeof(double));
    return;
  }
  constexpr int64_t kPiece = 256;
  float widened[kPiece];
  for (int64_t begin = 0; begin < count; begin += kPiece) {
    const int64_t piece = count - begin < kPiece ? count - begin : kPiece;
    widen(dtype, source + begin * element_size(dtype), piece, widened);
    for (int64_t i = 0; i < piece; ++i) target[begin + i] = widened[i];
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
