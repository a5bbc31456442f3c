// Elements in their storage types and as float, and packs of them: what one load or store moves.
#pragma once

#include <cstdint>
#include <type_traits>

#include "common/half.h"

namespace sam::cuda {

struct BFloat16 {
  uint16_t bits;
};

struct Float16 {
  uint16_t bits;
};

// kCount elements side by side, moved by one access: of 16 bytes where they have that many.
template <class S, int kCount>
struct alignas(sizeof(S) * kCount) Pack {
  S data[kCount];
};

struct Pair {
  float low, high;
};

// Two 16-bit elements that share a word, as floats.
SAM_INLINE Pair widen_pair(uint32_t word, BFloat16) { return {bits_float(word << 16), bits_float(word & 0xFFFF0000u)}; }

SAM_INLINE Pair widen_pair(uint32_t word, Float16) {
#if defined(__CUDA_ARCH__)
  Pair pair;
  asm("{ .reg .b16 low, high; mov.b32 {low, high}, %2; cvt.f32.f16 %0, low; cvt.f32.f16 %1, high; }"
      : "=f"(pair.low), "=f"(pair.high)
      : "r"(word));
  return pair;
#else
  return {float16_to_float(static_cast<uint16_t>(word)), float16_to_float(static_cast<uint16_t>(word >> 16))};
#endif
}

// Two floats, each rounded once to nearest even, in one word. A NaN becomes the device's own, whose bits differ from the host's.
SAM_INLINE uint32_t narrow_pair(Pair pair, BFloat16) {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 800
  uint32_t word;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(pair.high), "f"(pair.low));
  return word;
#else
  return static_cast<uint32_t>(float_to_bfloat16(pair.high)) << 16 | float_to_bfloat16(pair.low);
#endif
}

SAM_INLINE uint32_t narrow_pair(Pair pair, Float16) {
#if defined(__CUDA_ARCH__)
  uint32_t word;
  asm("{ .reg .b16 low, high; cvt.rn.f16.f32 low, %1; cvt.rn.f16.f32 high, %2; mov.b32 %0, {low, high}; }"
      : "=r"(word)
      : "f"(pair.low), "f"(pair.high));
  return word;
#else
  return static_cast<uint32_t>(float_to_float16(pair.high)) << 16 | float_to_float16(pair.low);
#endif
}

template <class S>
constexpr bool kIsHalf = sizeof(S) == 2;

// In the arithmetic type T. Exact.
template <class T, class S, int kCount>
SAM_INLINE Pack<T, kCount> widen(const Pack<S, kCount>& pack) {
  Pack<T, kCount> values;
  if constexpr (!kIsHalf<S>) {
    SAM_UNROLL
    for (int i = 0; i < kCount; ++i) values.data[i] = static_cast<T>(pack.data[i]);
  } else if constexpr (kCount == 1) {
    values.data[0] = static_cast<T>(widen_pair(pack.data[0].bits, S{}).low);
  } else {
    uint32_t words[kCount / 2];
    std::memcpy(words, &pack, sizeof words);
    SAM_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      const Pair pair = widen_pair(words[i], S{});
      values.data[2 * i] = static_cast<T>(pair.low);
      values.data[2 * i + 1] = static_cast<T>(pair.high);
    }
  }
  return values;
}

// Rounds each once, to nearest even; from double to 16 bits through float, as torch.
template <class S, class T, int kCount>
SAM_INLINE Pack<S, kCount> narrow(const Pack<T, kCount>& values) {
  Pack<S, kCount> pack;
  if constexpr (!kIsHalf<S>) {
    SAM_UNROLL
    for (int i = 0; i < kCount; ++i) pack.data[i] = static_cast<S>(values.data[i]);
  } else if constexpr (kCount == 1) {
    pack.data[0].bits = static_cast<uint16_t>(narrow_pair({static_cast<float>(values.data[0]), 0.0f}, S{}));
  } else {
    uint32_t words[kCount / 2];
    SAM_UNROLL
    for (int i = 0; i < kCount / 2; ++i) {
      words[i] = narrow_pair({static_cast<float>(values.data[2 * i]), static_cast<float>(values.data[2 * i + 1])}, S{});
    }
    std::memcpy(&pack, words, sizeof words);
  }
  return pack;
}

}  // namespace sam::cuda
