// Blocks of 16-bit storage to float and back. Included only by files compiled once per instruction set.
#pragma once

#include <cstdint>
#include <cstring>
#include <type_traits>

#include "common/half.h"
#include "common/operand.h"

#if defined(__F16C__) || defined(__AVX512BW__)
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

#if defined(__AVX512BW__)
#define SAM_HAS_HALVES
typedef __m512i Halves;
constexpr int kHalves = 32;  // 16-bit elements of a vector
static inline void store_halves(char* to, Halves halves) { _mm512_storeu_si512(to, halves); }
static inline void stream_halves(char* to, Halves halves) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), halves); }

// Masks of all elements: of the intrinsics without one GCC 12 warns that a variable in its own header is not initialized.
constexpr __mmask16 kAll16 = 0xFFFF;
constexpr __mmask8 kAll8 = 0xFF;

static inline __m512i shifted(__m512i words) { return _mm512_maskz_srli_epi32(kAll16, words, 16); }

// Words whose upper halves are the bfloat16 of 16 floats.
static inline __m512i bfloat16_words(__m512i bits) {
  const __m512i last = _mm512_and_si512(shifted(bits), _mm512_set1_epi32(1));
  const __m512i rounded = _mm512_add_epi32(_mm512_add_epi32(bits, _mm512_set1_epi32(0x7FFF)), last);
  const __mmask16 is_nan = _mm512_cmpgt_epu32_mask(_mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF)), _mm512_set1_epi32(0x7F800000));
  return _mm512_mask_blend_epi32(is_nan, rounded, _mm512_set1_epi32(0x7FC00000));
}

static inline __m512i upper_halves(__m512i low, __m512i high) {
  const __m512i odd = _mm512_add_epi32(
      _mm512_mullo_epi32(_mm512_set_epi32(15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0), _mm512_set1_epi32(0x00040004)),
      _mm512_set1_epi32(0x00030001));  // 1, 3, 5, ...
  return _mm512_permutex2var_epi16(low, odd, high);
}

static inline __m512i narrow_vector_bfloat16(const float* source) {
  return upper_halves(bfloat16_words(_mm512_loadu_si512(source)), bfloat16_words(_mm512_loadu_si512(source + 16)));
}

static inline __m256i narrow_vector_float16(__m512 value) {
  const __m512i sign = _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(static_cast<int>(0x80000000u)));
  const __m512i nan = _mm512_or_si512(sign, _mm512_set1_epi32(0x7FC00000));  // as narrow_float16
  const __mmask16 is_nan = _mm512_cmp_ps_mask(value, value, _CMP_UNORD_Q);
  const __m512i canonical = _mm512_mask_blend_epi32(is_nan, _mm512_castps_si512(value), nan);
  return _mm512_maskz_cvtps_ph(kAll16, _mm512_castsi512_ps(canonical), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline __m512i narrow_vector_float16(const float* source) {
  const __m256i low = narrow_vector_float16(_mm512_loadu_ps(source)), high = narrow_vector_float16(_mm512_loadu_ps(source + 16));
  return _mm512_maskz_inserti64x4(kAll8, _mm512_castsi256_si512(low), high, 1);
}
#elif defined(__AVX2__) && defined(__F16C__)
#define SAM_HAS_HALVES
typedef __m256i Halves;
constexpr int kHalves = 16;
static inline void store_halves(char* to, Halves halves) { _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), halves); }
static inline void stream_halves(char* to, Halves halves) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), halves); }

// Words whose upper halves are the bfloat16 of 8 floats.
static inline __m256i bfloat16_words(__m256i bits) {
  const __m256i last = _mm256_and_si256(_mm256_srli_epi32(bits, 16), _mm256_set1_epi32(1));
  const __m256i rounded = _mm256_add_epi32(_mm256_add_epi32(bits, _mm256_set1_epi32(0x7FFF)), last);
  const __m256i is_nan = _mm256_cmpgt_epi32(_mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF)), _mm256_set1_epi32(0x7F800000));
  return _mm256_blendv_epi8(rounded, _mm256_set1_epi32(0x7FC00000), is_nan);
}

static inline __m256i upper_halves(__m256i low, __m256i high) {
  const __m256i pairs = _mm256_packus_epi32(_mm256_srli_epi32(low, 16), _mm256_srli_epi32(high, 16));  // by 128-bit lanes
  return _mm256_permute4x64_epi64(pairs, 0xD8);
}

static inline __m256i narrow_vector_bfloat16(__m256 low, __m256 high) {
  return upper_halves(bfloat16_words(_mm256_castps_si256(low)), bfloat16_words(_mm256_castps_si256(high)));
}

static inline __m256i narrow_vector_bfloat16(const float* source) {
  return narrow_vector_bfloat16(_mm256_loadu_ps(source), _mm256_loadu_ps(source + 8));
}

#define SAM_HAS_WIDENING
typedef __m256 Floats;
static inline Floats load_floats(const char* from) { return _mm256_loadu_ps(reinterpret_cast<const float*>(from)); }

static inline __m256 widen_vector_bfloat16(const char* source) {
  const __m256i words = _mm256_cvtepu16_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(source)));
  return _mm256_castsi256_ps(_mm256_slli_epi32(words, 16));
}

static inline __m128i narrow_vector_float16(__m256 value) {
  // One NaN for all, as the scalar conversion has: the instruction would keep the payload.
  const __m256 nan = _mm256_or_ps(_mm256_and_ps(value, _mm256_set1_ps(-0.0f)), _mm256_castsi256_ps(_mm256_set1_epi32(0x7FC00000)));
  const __m256 canonical = _mm256_blendv_ps(value, nan, _mm256_cmp_ps(value, value, _CMP_UNORD_Q));
  return _mm256_cvtps_ph(canonical, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}

static inline __m256i narrow_vector_float16(const float* source) {
  return _mm256_set_m128i(narrow_vector_float16(_mm256_loadu_ps(source + 8)), narrow_vector_float16(_mm256_loadu_ps(source)));
}
#endif

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
