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

template <class T>
static void store_stochastic(const Operand& operand, int64_t begin, int count, const T* values, const uint32_t* words, bool streaming) {
  Buffer<uint16_t> half;
#pragma omp simd
  for (int i = 0; i < count; ++i) half.data[i] = float_to_bfloat16_stochastic(static_cast<float>(values[i]), words[i]);
  put_bytes(address(operand, begin), half.data, count * int64_t{sizeof(uint16_t)}, streaming);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
