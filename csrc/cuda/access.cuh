// How the operands of a row are read and written: as packs of one storage type, 16 bytes at a time (Uniform), or each in its own type
// (Mixed). And the loop over a chunk: whole packs where every operand is aligned, single elements for the rest.
#pragma once

#include <type_traits>

#include "cuda/config.h"
#include "cuda/multi_tensor.cuh"
#include "cuda/values.cuh"

namespace sam::cuda {

// Elements [i, ...) of a chunk. The offset is made in 32 bits: a chunk's first element is the same for all threads, and lies in no register
// of theirs.
template <class Target, class S>
SAM_INLINE Target* at(const Operand& operand, int i) {
  return reinterpret_cast<Target*>(static_cast<char*>(operand.data) + static_cast<uint32_t>(i) * static_cast<uint32_t>(sizeof(S)));
}

// The elements as they lie there, in one access: by value, or what takes them apart would read them one by one, and 8 bytes as a number, or
// they would be read as two words.
template <class S, int kCount>
SAM_INLINE Pack<S, kCount> read_pack(const Operand& operand, int i) {
  using P = Pack<S, kCount>;
  if constexpr (sizeof(P) == sizeof(uint64_t)) {
    const uint64_t bits = *at<const uint64_t, S>(operand, i);
    P pack;
    std::memcpy(&pack, &bits, sizeof pack);
    return pack;
  } else {
    return *at<const P, S>(operand, i);
  }
}

// Every operand is of type S; arithmetic is float.
template <class S>
struct Uniform {
  using Arithmetic = float;
  static constexpr int kWidth = 16 / sizeof(S);
  static constexpr int kBlocks = 4;  // resident on a processor, by registers: 2048 threads, all there can be
  static constexpr bool kHasBFloat16 = std::is_same_v<S, BFloat16>, kHasMasters = false;

  template <int kCount>
  using Raw = Pack<S, kCount>;
  template <int kCount>
  using Values = Pack<float, kCount>;

  SAM_INLINE static int size_of(const Operand&) { return sizeof(S); }

  // As stored.
  template <int kCount>
  SAM_INLINE static Raw<kCount> load_raw(const Operand& operand, int i) {
    return read_pack<S, kCount>(operand, i);
  }

  template <int kCount>
  SAM_INLINE static Values<kCount> values(const Raw<kCount>& raw) {
    return widen<float>(raw);
  }

  template <int kCount>
  SAM_INLINE static void store(const Operand& operand, int i, const Values<kCount>& values) {
    *at<Raw<kCount>, S>(operand, i) = narrow<S>(values);
  }

  // Writes elsewhere, bit for bit, what was just read.
  template <int kCount>
  SAM_INLINE static void copy(const Operand&, const Operand& to, int i, const Raw<kCount>& raw) {
    *at<Raw<kCount>, S>(to, i) = raw;
  }
};

// Operands of several types; arithmetic is T, double as soon as one of them is float64.
template <class T>
struct Mixed {
  using Arithmetic = T;
  static constexpr int kWidth = 16 / sizeof(T);
  static constexpr int kBlocks = 2;
  static constexpr bool kHasBFloat16 = true, kHasMasters = true;  // float32 beside 16-bit parameters

  template <int kCount>
  using Raw = Pack<T, kCount>;  // what is stored differs from row to row
  template <int kCount>
  using Values = Pack<T, kCount>;

  SAM_INLINE static int size_of(const Operand& operand) { return element_size(operand.dtype); }

  template <int kCount>
  SAM_INLINE static Raw<kCount> load_raw(const Operand& operand, int i) {
    switch (operand.dtype) {
      case DType::kBFloat16: return widen<T>(read_pack<BFloat16, kCount>(operand, i));
      case DType::kFloat16: return widen<T>(read_pack<Float16, kCount>(operand, i));
      case DType::kFloat32: return widen<T>(read_pack<float, kCount>(operand, i));
      default: return read_pack<T, kCount>(operand, i);  // float64: T is double
    }
  }

  template <int kCount>
  SAM_INLINE static Values<kCount> values(const Raw<kCount>& raw) {
    return raw;
  }

  template <int kCount>
  SAM_INLINE static void store(const Operand& operand, int i, const Values<kCount>& values) {
    switch (operand.dtype) {
      case DType::kBFloat16: *at<Pack<BFloat16, kCount>, BFloat16>(operand, i) = narrow<BFloat16>(values); break;
      case DType::kFloat16: *at<Pack<Float16, kCount>, Float16>(operand, i) = narrow<Float16>(values); break;
      case DType::kFloat32: *at<Pack<float, kCount>, float>(operand, i) = narrow<float>(values); break;
      default: *at<Values<kCount>, T>(operand, i) = values;  // float64: T is double
    }
  }

  // Bit for bit where the types agree: the way to float and back would lose what a NaN carries.
  template <int kCount>
  SAM_INLINE static void copy(const Operand& from, const Operand& to, int i, const Raw<kCount>& raw) {
    if (from.dtype != to.dtype) {
      store<kCount>(to, i, raw);
    } else if (element_size(to.dtype) == 2) {
      copy_bits<uint16_t, kCount>(from, to, i);
    } else if (element_size(to.dtype) == 4) {
      copy_bits<uint32_t, kCount>(from, to, i);
    } else {
      copy_bits<T, kCount>(from, to, i);
    }
  }

 private:
  template <class Bits, int kCount>
  SAM_INLINE static void copy_bits(const Operand& from, const Operand& to, int i) {
    *at<Pack<Bits, kCount>, Bits>(to, i) = read_pack<Bits, kCount>(from, i);
  }
};

// kCount elements in the arithmetic type.
template <class Access, int kCount>
SAM_INLINE typename Access::template Values<kCount> load(const Operand& operand, int i) {
  return Access::template values<kCount>(Access::template load_raw<kCount>(operand, i));
}

template <class Access, int kCount>
SAM_INLINE void store(const Operand& operand, int i, const typename Access::template Values<kCount>& values) {
  Access::template store<kCount>(operand, i, values);
}

// One or the other by value: a choice between references would put both on the stack.
SAM_INLINE Operand choose(bool first, const Operand& one, const Operand& other) {
  return {first ? one.data : other.data, first ? one.dtype : other.dtype};
}

template <int kCount>
struct Width {
  static constexpr int value = kCount;
};

// Whether every operand of a chunk can be moved in packs. An operand that takes no part is null, and aligned.
template <class Access, int kRoles>
SAM_INLINE bool is_aligned(const Piece<kRoles>& piece) {
  bool aligned = true;
  SAM_UNROLL
  for (int role = 0; role < kRoles; ++role) {
    const uintptr_t pack_bytes = static_cast<uintptr_t>(Access::size_of(piece.operands[role])) * Access::kWidth;
    aligned = aligned && (reinterpret_cast<uintptr_t>(piece.operands[role].data) & (pack_bytes - 1)) == 0;
  }
  return aligned;
}

// Calls body(Width<n>, i) for this thread's elements [i, i + n) of the chunk, which so many threads share. kTogether: packs in flight.
template <class Access, int kTogether = 1, int kRoles, class Body>
SAM_INLINE void for_each_pack(const Piece<kRoles>& piece, int thread, Body body, int threads = kThreads) {
  constexpr int kWidth = Access::kWidth;
  const int whole = is_aligned<Access>(piece) ? piece.count / kWidth * kWidth : 0;
#pragma unroll(kTogether)
  for (int i = thread * kWidth; i < whole; i += threads * kWidth) body(Width<kWidth>{}, i);
  SAM_NO_UNROLL
  for (int i = whole + thread; i < piece.count; i += threads) body(Width<1>{}, i);
}

// The chunk of one operand to another, without arithmetic.
template <class Access, int kRoles>
SAM_INLINE void copy_chunk(const Piece<kRoles>& piece, const Operand& from, const Operand& to, int thread) {
  for_each_pack<Access>(piece, thread, [&](auto width, int i) {
    constexpr int kCount = decltype(width)::value;
    Access::template copy<kCount>(from, to, i, Access::template load_raw<kCount>(from, i));
  });
}

}  // namespace sam::cuda
