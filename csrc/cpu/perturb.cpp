// The ascent: saves the parameter and moves it along its gradient. Reads p, g; writes old_p, p: 4 N s bytes (from_old: reads old_p, g;
// writes p: 3 N s). And the copies without arithmetic: saving alone, restoring.
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

#if defined(SAM_HAS_WIDENING)
// Whether a row is what perturb_masters() takes.
static bool is_of_masters(const Row& row, const Perturb& options) {
  return options.from_old && !options.scaling.is_adaptive && row[kOldParam].dtype == DType::kFloat32 &&
         row[kParam].dtype == DType::kBFloat16 && row[kGrad].dtype == DType::kBFloat16;
}

// From float32 masters to bfloat16 parameters, in whole vectors from one memory to the other. Returns how many elements it did.
static int perturb_masters(const Row& row, Span span, const Perturb& options, bool streams) {
  const Floats scale = Floats{} + float(perturb_scale(options, inverse_of(options.step.grad_scale)));
  const char* master = address(row[kOldParam], span.begin);
  const char* grad = address(row[kGrad], span.begin);
  const auto perturbed = [&](int i) {
    return perturb(load_floats(master + int64_t{4} * i), widen_vector_bfloat16(grad + int64_t{2} * i), scale);
  };
  return put_halves(address(row[kParam], span.begin), static_cast<int>(span.end - span.begin), streams, [&](int i) {
    prefetch(master + int64_t{4} * i, 4 * kHalves);
    prefetch(grad + int64_t{2} * i, 2 * kHalves);
    return narrow_vector_bfloat16(perturbed(i), perturbed(i + kHalves / 2));
  });
}
#endif

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
#if defined(SAM_HAS_WIDENING)
  if (is_of_masters(row, options)) span.begin += perturb_masters(row, span, options, streams);
#endif
  has_float64(row) ? perturb_chunk<double>(row, span, options, streams) : perturb_chunk<float>(row, span, options, streams);
}

void copy(const Row& row, Span span, const NoOptions&, bool streams) {
  for_each_step(span, step_of(row), [&](int64_t begin, int count) { copy(row[kSource], row[kDestination], begin, count, streams); });
  stream_fence();
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
