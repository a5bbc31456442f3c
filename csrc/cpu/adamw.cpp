// Restore and torch.optim.Adam / AdamW in one pass. Reads old_p, g, m, v; writes p, m, v: 7 N s bytes. Without old_param: in place.
// to_old: writes old_p too.
#include "cpu/update.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <Decay kDecay, class T>
static void adamw_chunk(const Row& row, Span span, const Adam& options, bool streams, double step, uint32_t index) {
  const AdamConstants<T> constants = adam_constants<T>(options, bias_corrections(options, step));
  update_blocks<T>(row, span, options.update, streams, index, [&](int64_t begin, int count, const T* param, T* result) {
    Buffer<T> grad_buffer, exp_avg_buffer, exp_avg_sq_buffer;
    const T* grad = load(row[kGrad], begin, count, grad_buffer);
    load(row[kExpAvg], begin, count, exp_avg_buffer);
    load(row[kExpAvgSq], begin, count, exp_avg_sq_buffer);
    T* exp_avg = target(row[kExpAvg], begin, exp_avg_buffer);
    T* exp_avg_sq = target(row[kExpAvgSq], begin, exp_avg_sq_buffer);
    // In registers. What a lambda captures is loaded again for each vector: 5 to 9 % of the time in the cache (AVX2).
    const AdamConstants<T> c = constants;
#pragma omp simd
    for (int i = 0; i < count; ++i) {
      result[i] = adamw_step<kDecay>(param[i], grad[i], exp_avg[i], exp_avg_sq[i], c);
    }
    store(row[kExpAvg], begin, count, exp_avg);
    store(row[kExpAvgSq], begin, count, exp_avg_sq);
  });
}

template <class T>
static void choose_decay(const Row& row, Span span, const Adam& options, bool streams, double step, uint32_t index) {
  switch (decay_of(options)) {
    case Decay::kNone: adamw_chunk<Decay::kNone, T>(row, span, options, streams, step, index); break;
    case Decay::kL2: adamw_chunk<Decay::kL2, T>(row, span, options, streams, step, index); break;
    case Decay::kDecoupled: adamw_chunk<Decay::kDecoupled, T>(row, span, options, streams, step, index); break;
  }
}

void adamw(const Row& row, Span span, const Adam& options, bool streams, double step, uint32_t index) {
  has_float64(row) ? choose_decay<double>(row, span, options, streams, step, index)
                   : choose_decay<float>(row, span, options, streams, step, index);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
