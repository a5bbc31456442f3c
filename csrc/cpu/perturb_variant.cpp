// The ascent as few ask for it: along a direction made with a moving average m, stored with stochastic rounding, or both. Reads p, g, m;
// writes old_p, p. Beside the ordinary pass, not in it, so that one keeps its code.
#include "cpu/stochastic.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static void perturb_variant_chunk(const Row& row, Span span, const PerturbVariant& options, bool streams, uint32_t index) {
  const bool has_ema = row[kEma].data != nullptr, from_old = options.ascent.from_old;
  const double inv_grad_scale = inverse_of(options.ascent.step.grad_scale);
  // A direction is unscaled, and so is the norm that comes with it.
  const T scale = T(perturb_scale(options.ascent, has_ema ? 1.0 : inv_grad_scale));
  const Scaling<T> scaling = options.ascent.scaling.as<T>();
  const T grad_weight = T(options.grad_weight * inv_grad_scale), ema_weight = T(options.ema_weight);
  const bool is_stochastic = options.is_stochastic && row[kParam].dtype == DType::kBFloat16;
  Tile tile;
  const auto start = [&](int64_t begin, int lanes) {
    if (is_stochastic) fill(tile, begin, lanes, options.seed, kRoundingStream, index);
  };
  for_each_tile(span, start, [&](int64_t begin, int count, int word) {
    Buffer<T> param_buffer, grad_buffer, ema_buffer, direction, result_buffer;
    const T* step = direction.data;
    if (!has_ema) {
      step = load(row[kGrad], begin, count, grad_buffer);
    } else if (options.grad_weight == 0) {  // not multiplied by 0: it may not be finite
      const T* ema = load(row[kEma], begin, count, ema_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) direction.data[i] = ema[i] * ema_weight;
    } else {
      const T* grad = load(row[kGrad], begin, count, grad_buffer);
      const T* ema = load(row[kEma], begin, count, ema_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) direction.data[i] = grad[i] * grad_weight + ema[i] * ema_weight;
    }
    const T* param = load(row[from_old ? kOldParam : kParam], begin, count, param_buffer);
    if (!from_old) copy(row[kParam], row[kOldParam], begin, count, streams);
    T* result = from_old ? result_buffer.data : target(row[kParam], begin, result_buffer);
    move_along(param, step, count, scale, scaling, result);
    if (is_stochastic) {
      store_stochastic(row[kParam], begin, count, result, tile.word[word], from_old && streams);
    } else {
      store(row[kParam], begin, count, result, from_old && streams);
    }
  });
  stream_fence();
}

void perturb_variant(const Row& row, Span span, const PerturbVariant& options, bool streams, uint32_t index) {
  has_float64(row) ? perturb_variant_chunk<double>(row, span, options, streams, index)
                   : perturb_variant_chunk<float>(row, span, options, streams, index);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
