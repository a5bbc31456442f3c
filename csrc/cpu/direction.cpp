// A moving average of gradients and the sum of squares of the direction made with it, |d|^2 or |T_w d|^2. Reads g, m (and p when adaptive);
// writes m: 3 N s bytes.
#include "cpu/squares.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <Direction kDirection, bool kFirst, class T>
static double direction_chunk(const Row& row, Span span, const MovingDirection& options) {
  const DirectionConstants<T> constants = direction_constants<T>(options);
  Lanes lanes;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> grad_buffer, ema_buffer, direction;
    const T* grad = load(row[kDirectionGrad], begin, count, grad_buffer);
    if constexpr (!kFirst) load(row[kDirectionEma], begin, count, ema_buffer);
    T* ema = target(row[kDirectionEma], begin, ema_buffer);
#pragma omp simd
    for (int i = 0; i < count; ++i) direction.data[i] = update_direction<kDirection, kFirst>(grad[i], ema[i], constants);
    store(row[kDirectionEma], begin, count, ema);
    add_scaled_squares(row[kDirectionParam], begin, direction.data, count, options.scaling, false, lanes);
  });
  return total(lanes);
}

template <class T>
static double choose_direction(const Row& row, Span span, const MovingDirection& options) {
  if (options.first_step) return direction_chunk<Direction::kVasso, true, T>(row, span, options);  // the gradient itself, for both
  return options.is_friendly ? direction_chunk<Direction::kFriendly, false, T>(row, span, options)
                             : direction_chunk<Direction::kVasso, false, T>(row, span, options);
}

double direction_norm(const Row& row, Span span, const MovingDirection& options) {
  return has_float64(row) ? choose_direction<double>(row, span, options) : choose_direction<float>(row, span, options);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
