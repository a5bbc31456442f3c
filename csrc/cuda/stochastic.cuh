// Stochastic rounding to bfloat16, tile by tile.
#pragma once

#include "cuda/tiles.cuh"

namespace sam::cuda {

// Adds random bits below the last one that is kept and truncates: the expectation of what is stored is the value. NaN and infinities have
// none, and are rounded as usual.
SAM_INLINE uint16_t stochastic_bfloat16(float value, uint32_t word) {
  const uint32_t bits = float_bits(value);
  const bool finite = (bits & 0x7FFFFFFFu) < 0x7F800000u;
  return static_cast<uint16_t>(finite ? (bits + (word >> 16)) >> 16 : narrow_pair({value, 0.0f}, BFloat16{}));
}

// Of each word of a counter, kCount lanes.
template <int kCount>
struct RoundingWords {
  uint32_t of[kWords][kCount];
};

template <int kCount>
SAM_INLINE RoundingWords<kCount> rounding_words(uint64_t counter, const RandomSeed& seed, uint32_t row) {
  RoundingWords<kCount> words;
  SAM_UNROLL
  for (int j = 0; j < kCount; ++j) {
    const Words<uint64_t> found = random_words(counter + static_cast<uint64_t>(j), seed, kRoundingStream, row);
    SAM_UNROLL
    for (int word = 0; word < kWords; ++word) words.of[word][j] = static_cast<uint32_t>(found.word[word]);
  }
  return words;
}

// Values of an operand that is bfloat16.
template <int kCount, class T>
SAM_INLINE void store_stochastic(const Operand& operand, int i, const T (&values)[kCount], const uint32_t (&words)[kCount]) {
  Pack<BFloat16, kCount> rounded;
  SAM_UNROLL
  for (int j = 0; j < kCount; ++j) rounded.data[j].bits = stochastic_bfloat16(static_cast<float>(values[j]), words[j]);
  *at<Pack<BFloat16, kCount>, BFloat16>(operand, i) = rounded;
}

}  // namespace sam::cuda
