// 16-bit storage to float and back, one number, round to nearest even.
#pragma once

#include <cstdint>

#include "common/bits.h"

namespace sam {

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

}  // namespace sam
