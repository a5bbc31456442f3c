// A moving average of gradients and the sum of squares of the direction made with it, |d|^2 or |T_w d|^2. Reads g, m (and p when adaptive);
// writes m: 3 N s bytes.
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <Direction kDirection, bool kFirst, class T>
static double direction_chunk(const Row& row, Span span, const DirectionArgs& args) {
  const DirectionConstants<T> constants{T(args.inv_grad_scale), T(args.decay), T(args.gain), T(args.sigma)};
  Lanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> grad_buffer, param_buffer, ema_buffer, direction;
    const T* grad = load(row.grad, begin, count, grad_buffer);
    if constexpr (!kFirst) load(row.state[0], begin, count, ema_buffer);
    T* ema = target(row.state[0], begin, ema_buffer);
#pragma omp simd
    for (int i = 0; i < count; ++i) direction.data[i] = update_direction<kDirection, kFirst>(grad[i], ema[i], constants);
    store(row.state[0], begin, count, ema);
    if (args.adaptive) {
      add_adaptive_squares(load(row.param, begin, count, param_buffer), direction.data, count, args.eta, lanes);
    } else {
      add_squares(direction.data, count, false, lanes);
    }
  });
  return total(lanes);
}

template <class T>
static double choose_direction(const Row& row, Span span, const DirectionArgs& args) {
  if (args.first_step) return direction_chunk<Direction::kVasso, true, T>(row, span, args);  // the gradient itself, for both
  return args.friendly ? direction_chunk<Direction::kFriendly, false, T>(row, span, args)
                       : direction_chunk<Direction::kVasso, false, T>(row, span, args);
}

double direction_norm(const Row& row, Span span, const DirectionArgs& args) {
  return has_float64(row) ? choose_direction<double>(row, span, args) : choose_direction<float>(row, span, args);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
