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
#endif

template <class T>
static void store_stochastic(const Operand& operand, int64_t begin, int count, const T* values, const uint32_t* words, bool streaming) {
  char* destination = address(operand, begin);
  int done = 0;
#if defined(__AVX512BW__)
  if constexpr (std::is_same_v<T, float>) {
    done = put_halves(destination, count, streaming, [&](int i) {
      return upper_halves(stochastic_words(values + i, words + i), stochastic_words(values + i + 16, words + i + 16));
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
