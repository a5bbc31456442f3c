// 16-bit storage to float and back, round to nearest even. Included only by files compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/bits.h"

#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace sam::cpu {

SAM_INLINE float bfloat16_to_float(uint16_t half) { return bits_float(static_cast<uint32_t>(half) << 16); }

SAM_INLINE uint16_t float_to_bfloat16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
  // Compared as signed numbers: the oldest vector instruction sets have no unsigned comparison.
  const bool is_nan = static_cast<int32_t>(bits & 0x7FFFFFFFu) > 0x7F800000;
  return static_cast<uint16_t>(is_nan ? 0x7FC0u : rounded);
}

// Branch-free so that it vectorises without F16C. A subnormal half is rebuilt by an exact subtraction, which works with denormals flushed.
SAM_INLINE float float16_to_float(uint16_t half) {
  const uint32_t sign = static_cast<uint32_t>(half & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(half & 0x7FFFu) << 13;
  const uint32_t exponent = magnitude & 0x0F800000u;
  const uint32_t normal = magnitude + 0x38000000u;
  const uint32_t special = magnitude + 0x70000000u;  // inf, nan
  const uint32_t subnormal = float_bits(bits_float(magnitude + 0x38800000u) - bits_float(0x38800000u));
  const uint32_t bits = exponent == 0x0F800000u ? special : (exponent == 0 ? subnormal : normal);
  return bits_float(bits | sign);
}

SAM_INLINE uint16_t float_to_float16(float value) {
  const uint32_t bits = float_bits(value);
  const uint32_t sign = bits & 0x80000000u;
  const uint32_t magnitude = bits ^ sign;
  const uint32_t special = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
  // Below the smallest normal half: adding 0.5 puts the half's last bit at the float's last bit, and the addition rounds to nearest even.
  const uint32_t subnormal = float_bits(bits_float(magnitude) + 0.5f) - 0x3F000000u;
  const uint32_t normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t half = magnitude >= 0x47800000u ? special : (magnitude < 0x38800000u ? subnormal : normal);
  return static_cast<uint16_t>(half | (sign >> 16));
}

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

}  // namespace SAM_ISA
}  // namespace sam::cpu
