// Stochastic rounding to bfloat16. Included only by files compiled once per instruction set.
#pragma once

#include "cpu/tile.h"

namespace sam::cpu {
inline namespace SAM_ISA {

// Adds random bits below the last one that is kept and truncates: the expectation of what is stored is the value. NaN and infinities have
// none, and are rounded as usual.
SAM_INLINE uint16_t float_to_bfloat16_stochastic(float value, uint32_t word) {
  const uint32_t bits = float_bits(value);
  const bool is_finite = static_cast<int32_t>(bits & 0x7FFFFFFFu) < 0x7F800000;
  return is_finite ? static_cast<uint16_t>((bits + (word >> 16)) >> 16) : float_to_bfloat16(value);
}

#if defined(__AVX512BW__)
// Words whose upper halves are the results of 16 floats.
static inline __m512i stochastic_words(const float* values, const uint32_t* words) {
  const __m512i bits = _mm512_loadu_si512(values), random = shifted(_mm512_loadu_si512(words));
  const __m512i magnitude = _mm512_and_si512(bits, _mm512_set1_epi32(0x7FFFFFFF));
  const __mmask16 is_finite = _mm512_cmplt_epu32_mask(magnitude, _mm512_set1_epi32(0x7F800000));
  return _mm512_mask_blend_epi32(is_finite, bfloat16_words(bits), _mm512_add_epi32(bits, random));
}
#elif defined(SAM_HAS_HALVES)
// Words whose upper halves are the results of 8 floats.
static inline __m256i stochastic_words(const float* values, const uint32_t* words) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(values));
  const __m256i random = _mm256_srli_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(words)), 16);
  const __m256i magnitude = _mm256_and_si256(bits, _mm256_set1_epi32(0x7FFFFFFF));
  const __m256i is_finite = _mm256_cmpgt_epi32(_mm256_set1_epi32(0x7F800000), magnitude);
  return _mm256_blendv_epi8(bfloat16_words(bits), _mm256_add_epi32(bits, random), is_finite);
}
#endif

template <class T>
static void store_stochastic(const Operand& operand, int64_t begin, int count, const T* values, const uint32_t* words, bool streaming) {
  char* destination = address(operand, begin);
  int done = 0;
#if defined(SAM_HAS_HALVES)
  if constexpr (std::is_same_v<T, float>) {
    constexpr int kHalf = kHalves / 2;
    done = put_halves(destination, count, streaming, [&](int i) {
      return upper_halves(stochastic_words(values + i, words + i), stochastic_words(values + i + kHalf, words + i + kHalf));
    });
  }
#endif
  Buffer<uint16_t> half;
#pragma omp simd
  for (int i = done; i < count; ++i) half.data[i - done] = float_to_bfloat16_stochastic(static_cast<float>(values[i]), words[i]);
  const int64_t size = sizeof(uint16_t);
  put_bytes(destination + done * size, half.data, (count - done) * size, streaming);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
