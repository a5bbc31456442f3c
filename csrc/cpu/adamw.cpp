// Restore and torch.optim.Adam / AdamW in one pass. Reads old_p, g, m, v; writes p, m, v: 7 N s bytes. Without old_param: in place.
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <Decay kDecay, class T>
static void adamw_chunk(const Row& row, Span span, const AdamArgs& args, double step) {
  const AdamConstants<T> constants = adam_constants<T>(args, bias_corrections(args.lr, args.beta1, args.beta2, step));
  const bool restores = row.old_param.data != nullptr;
  const Operand& source = restores ? row.old_param : row.param;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> param_buffer, grad_buffer, exp_avg_buffer, exp_avg_sq_buffer, result_buffer;
    const T* grad = load(row.grad, begin, count, grad_buffer);
    const T* param = load(source, begin, count, param_buffer);
    load(row.state[0], begin, count, exp_avg_buffer);
    load(row.state[1], begin, count, exp_avg_sq_buffer);
    T* exp_avg = target(row.state[0], begin, exp_avg_buffer);
    T* exp_avg_sq = target(row.state[1], begin, exp_avg_sq_buffer);
    T* result = restores ? result_buffer.data : target(row.param, begin, result_buffer);
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      result[i] = adamw_step<kDecay>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], constants);
    }
    store(row.state[0], begin, count, exp_avg);
    store(row.state[1], begin, count, exp_avg_sq);
    store(row.param, begin, count, result, restores && args.streaming);
  });
  stream_fence();
}

template <class T>
static void choose_decay(const Row& row, Span span, const AdamArgs& args, double step) {
  if (args.weight_decay == 0) {
    adamw_chunk<Decay::kNone, T>(row, span, args, step);
  } else if (args.decoupled) {
    adamw_chunk<Decay::kDecoupled, T>(row, span, args, step);
  } else {
    adamw_chunk<Decay::kL2, T>(row, span, args, step);
  }
}

void adamw(const Row& row, Span span, const AdamArgs& args, double step) {
  if (has_float64(row)) {
    choose_decay<double>(row, span, args, step);
  } else {
    choose_decay<float>(row, span, args, step);
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
