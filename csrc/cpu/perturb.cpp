// The ascent: saves the parameter and moves it along its gradient. Reads p, g; writes old_p, p: 4 N s bytes (from_old: reads old_p, g;
// writes p: 3 N s). And the copies without arithmetic: saving alone, restoring.
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static void perturb_chunk(const Row& row, Span span, const Perturb& options, bool streams) {
  const T scale = T(perturb_scale(options, inverse_of(options.step.grad_scale)));
  const Scaling<T> scaling = options.scaling.as<T>();
  const bool from_old = options.from_old;
  for_each_step(span, step_of(row), [&](int64_t begin, int count) {
    Buffer<T> grad_buffer;
    const T* grad = load(row[kGrad], begin, count, grad_buffer);
    rewrite<T>(row, kParam, from_old ? kOldParam : kParam, begin, count, streams, [&](const T* param, T* result) {
      if (!from_old) copy(row[kParam], row[kOldParam], begin, count, streams);
      move_along(param, grad, count, scale, scaling, result);
    });
  });
  stream_fence();
}

void perturb(const Row& row, Span span, const Perturb& options, bool streams) {
  has_float64(row) ? perturb_chunk<double>(row, span, options, streams) : perturb_chunk<float>(row, span, options, streams);
}

void copy(const Row& row, Span span, const NoOptions&, bool streams) {
  for_each_step(span, step_of(row), [&](int64_t begin, int count) { copy(row[kSource], row[kDestination], begin, count, streams); });
  stream_fence();
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
