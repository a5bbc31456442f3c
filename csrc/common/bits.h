// A float and its bits, and how functions of these headers are inlined.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__CUDACC__)
#define SAM_INLINE __host__ __device__ __forceinline__
#define SAM_UNROLL _Pragma("unroll")
#define SAM_NO_UNROLL _Pragma("unroll 1")
#else
// always_inline, not just inline: these headers are compiled once per instruction set, and an out-of-line copy of one set could be the one
// the linker keeps for all of them.
#define SAM_INLINE inline __attribute__((always_inline))
#define SAM_UNROLL _Pragma("GCC unroll 16")
#define SAM_NO_UNROLL
#endif

namespace sam {

SAM_INLINE uint32_t float_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

SAM_INLINE float bits_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

template <class T>
struct BitsOf;
template <>
struct BitsOf<float> {
  using type = uint32_t;
};
template <>
struct BitsOf<double> {
  using type = uint64_t;
};

// ``value`` where all bits of the mask are set, 0 where none is.
template <class T>
SAM_INLINE T masked(T value, typename BitsOf<T>::type mask) {
  typename BitsOf<T>::type bits;
  std::memcpy(&bits, &value, sizeof bits);
  bits &= mask;
  std::memcpy(&value, &bits, sizeof value);
  return value;
}

}  // namespace sam
