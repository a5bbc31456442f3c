// The ascent: saves the parameter and moves it along its gradient. Reads p, g; writes old_p, p: 4 N s bytes (from_old: reads old_p, g;
// writes p: 3 N s). And the copies without arithmetic: saving alone, restoring.
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <class T>
static void perturb_chunk(const Row& row, Span span, const PerturbArgs& args) {
  // In double and rounded once: 1 - lambd cancels for the lambd close to 1 of the schedule 1 - 1/t.
  const T scale = T(perturb_scale<double>(args.norm, args.rho, args.lambd, args.eps, args.inv_grad_scale));
  const T eta = T(args.eta);
  const Operand& source = args.from_old ? row.old_param : row.param;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> param_buffer, grad_buffer, result_buffer;
    const T* grad = load(row.grad, begin, count, grad_buffer);
    const T* param = load(source, begin, count, param_buffer);
    if (!args.from_old) copy(row.param, row.old_param, begin, count, args.streaming);
    // from_old: param is write-only, so it is staged and streamed; otherwise it was just read and is written where it lies.
    T* result = args.from_old ? result_buffer.data : target(row.param, begin, result_buffer);
    if (args.adaptive) {
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = perturb_adaptive(param[i], grad[i], scale, eta);
    } else {
#pragma omp simd
      for (int i = 0; i < count; ++i) result[i] = perturb(param[i], grad[i], scale);
    }
    store(row.param, begin, count, result, args.from_old && args.streaming);
  });
  stream_fence();
}

void perturb(const Row& row, Span span, const PerturbArgs& args) {
  if (has_float64(row)) {
    perturb_chunk<double>(row, span, args);
  } else {
    perturb_chunk<float>(row, span, args);
  }
}

void copy(const Row& row, Span span, const CopyArgs& args) {
  const Operand& from = args.save ? row.param : row.old_param;
  const Operand& to = args.save ? row.old_param : row.param;
  for_each_block(span, [&](int64_t begin, int count) { copy(from, to, begin, count, args.streaming); });
  stream_fence();
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
