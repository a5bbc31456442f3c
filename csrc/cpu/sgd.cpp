// Restore and torch.optim.SGD in one pass. Reads old_p, g, m; writes p, m: 5 N s bytes. Without old_param the step is made in place.
// to_old: writes old_p too.
#include "cpu/update.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <Momentum kMomentum, bool kWeightDecay, class T>
static void sgd_chunk(const Row& row, Span span, const Sgd& options, bool streams, uint32_t index) {
  const SgdConstants<T> constants = sgd_constants<T>(options);
  update_blocks<T>(row, span, options.update, streams, index, [&](int64_t begin, int count, const T* param, T* result) {
    Buffer<T> grad_buffer, momentum_buffer;
    const T* grad = load(row[kGrad], begin, count, grad_buffer);
    if constexpr (kMomentum == Momentum::kNone) {
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        T none{};
        result[i] = sgd_step<kMomentum, kWeightDecay>(param[i], grad[i], none, constants);
      }
    } else {
      T* buffer = target(row[kBuffer], begin, momentum_buffer);
      if constexpr (kMomentum == Momentum::kPlain || kMomentum == Momentum::kNesterov) {
        load(row[kBuffer], begin, count, momentum_buffer);
      }
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        result[i] = sgd_step<kMomentum, kWeightDecay>(param[i], grad[i], buffer[i], constants);
      }
      store(row[kBuffer], begin, count, buffer);
    }
  });
}

template <Momentum kMomentum, class T>
static void choose_decay(const Row& row, Span span, const Sgd& options, bool streams, uint32_t index) {
  options.update.weight_decay != 0 ? sgd_chunk<kMomentum, true, T>(row, span, options, streams, index)
                                   : sgd_chunk<kMomentum, false, T>(row, span, options, streams, index);
}

template <class T>
static void choose_momentum(const Row& row, Span span, const Sgd& options, bool streams, uint32_t index) {
  switch (momentum_of(options, row[kBuffer].data != nullptr)) {
    case Momentum::kNone: choose_decay<Momentum::kNone, T>(row, span, options, streams, index); break;
    case Momentum::kFirst: choose_decay<Momentum::kFirst, T>(row, span, options, streams, index); break;
    case Momentum::kPlain: choose_decay<Momentum::kPlain, T>(row, span, options, streams, index); break;
    case Momentum::kNesterov: choose_decay<Momentum::kNesterov, T>(row, span, options, streams, index); break;
    case Momentum::kFirstNesterov: choose_decay<Momentum::kFirstNesterov, T>(row, span, options, streams, index); break;
  }
}

void sgd(const Row& row, Span span, const Sgd& options, bool streams, uint32_t index) {
  has_float64(row) ? choose_momentum<double>(row, span, options, streams, index)
                   : choose_momentum<float>(row, span, options, streams, index);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
