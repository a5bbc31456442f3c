// The ascent as few ask for it: along a direction made with a moving average m, stored with stochastic rounding, or both. Reads p, g, m;
// writes old_p, p. Beside the ordinary pass, not in it, so that one keeps its code.
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

template <class T>
static void perturb_variant_chunk(const Row& row, Span span, const PerturbVariantArgs& args, uint32_t index) {
  const bool has_ema = row.state[0].data != nullptr;
  // A direction is unscaled, and so is the norm that comes with it.
  const T scale = T(perturb_scale<double>(args.norm, args.rho, args.lambd, args.eps, has_ema ? 1.0 : args.inv_grad_scale));
  const T eta = T(args.eta), grad_weight = T(args.grad_weight * args.inv_grad_scale), ema_weight = T(args.ema_weight);
  const bool stochastic = args.stochastic && row.param.dtype == DType::kBFloat16;
  const Operand& source = args.from_old ? row.old_param : row.param;
  Tile tile;
  const auto start = [&](int64_t begin, int lanes) {
    if (stochastic) fill(tile, begin, lanes, args.key, index);
  };
  for_each_tile(span, start, [&](int64_t begin, int count, int word) {
    Buffer<T> param_buffer, grad_buffer, ema_buffer, direction, result_buffer;
    const T* step = direction.data;
    if (!has_ema) {
      step = load(row.grad, begin, count, grad_buffer);
    } else if (args.grad_weight == 0) {  // not multiplied by 0: it may not be finite
      const T* ema = load(row.state[0], begin, count, ema_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) direction.data[i] = ema[i] * ema_weight;
    } else {
      const T* grad = load(row.grad, begin, count, grad_buffer);
      const T* ema = load(row.state[0], begin, count, ema_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) direction.data[i] = grad[i] * grad_weight + ema[i] * ema_weight;
    }
    const T* param = load(source, begin, count, param_buffer);
    if (!args.from_old) copy(row.param, row.old_param, begin, count, args.streaming);
    T* result = args.from_old ? result_buffer.data : target(row.param, begin, result_buffer);
    if (args.adaptive) {
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = perturb_adaptive(param[i], step[i], scale, eta);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = perturb(param[i], step[i], scale);
    }
    if (stochastic) {
      store_stochastic(row.param, begin, count, result, tile.word[word], args.from_old && args.streaming);
    } else {
      store(row.param, begin, count, result, args.from_old && args.streaming);
    }
  });
  stream_fence();
}

void perturb_variant(const Row& row, Span span, const PerturbVariantArgs& args, uint32_t index) {
  if (has_float64(row)) {
    perturb_variant_chunk<double>(row, span, args, index);
  } else {
    perturb_variant_chunk<float>(row, span, args, index);
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
