// Whether all elements of one chunk are finite, by their bits: the exponent of infinities and NaN is the largest. Reads g: 1 N s bytes.
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

// Bits: signed, because the oldest vector instruction sets have no unsigned maximum. infinity: its bits.
template <class Bits>
static bool all_below(const Operand& grad, Span span, Bits infinity) {
  constexpr Bits kMagnitude = static_cast<Bits>((uint64_t{1} << (8 * sizeof(Bits) - 1)) - 1);
  Bits most = 0;
  for_each_block(span, [&](int64_t begin, int count) {
    const char* source = address(grad, begin);
    const Bits* bits = reinterpret_cast<const Bits*>(source);
    prefetch<2>(source, count * int64_t{sizeof(Bits)});
#pragma omp simd reduction(max : most)
    for (int i = 0; i < count; ++i) {
      const Bits magnitude = static_cast<Bits>(bits[i] & kMagnitude);
      most = magnitude > most ? magnitude : most;
    }
  });
  return most < infinity;
}

bool finite(const Row& row, Span span) {
  const Operand& grad = row[kNormGrad];
  switch (grad.dtype) {
    case DType::kBFloat16: return all_below<int16_t>(grad, span, 0x7F80);
    case DType::kFloat16: return all_below<int16_t>(grad, span, 0x7C00);
    case DType::kFloat64: return all_below<int64_t>(grad, span, 0x7FF0000000000000);
    default: return all_below<int32_t>(grad, span, 0x7F800000);
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
