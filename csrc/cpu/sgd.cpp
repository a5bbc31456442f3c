// Restore and torch.optim.SGD in one pass. Reads old_p, g, m; writes p, m: 5 N s bytes. Without old_param the step is made in place.
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <Momentum kMomentum, bool kWeightDecay, class T>
static void sgd_chunk(const Row& row, Span span, const Sgd& options, bool streams) {
  const SgdConstants<T> constants = sgd_constants<T>(options);
  const int from = row[kOldParam].data != nullptr ? kOldParam : kParam;
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> grad_buffer, momentum_buffer;
    const T* grad = load(row[kGrad], begin, count, grad_buffer);
    rewrite<T>(row, kParam, from, begin, count, streams, [&](const T* param, T* result) {
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
  });
  stream_fence();
}

template <Momentum kMomentum, class T>
static void choose_decay(const Row& row, Span span, const Sgd& options, bool streams) {
  options.update.weight_decay != 0 ? sgd_chunk<kMomentum, true, T>(row, span, options, streams)
                                   : sgd_chunk<kMomentum, false, T>(row, span, options, streams);
}

template <class T>
static void choose_momentum(const Row& row, Span span, const Sgd& options, bool streams) {
  switch (momentum_of(options, row[kBuffer].data != nullptr)) {
    case Momentum::kNone: choose_decay<Momentum::kNone, T>(row, span, options, streams); break;
    case Momentum::kFirst: choose_decay<Momentum::kFirst, T>(row, span, options, streams); break;
    case Momentum::kPlain: choose_decay<Momentum::kPlain, T>(row, span, options, streams); break;
    case Momentum::kNesterov: choose_decay<Momentum::kNesterov, T>(row, span, options, streams); break;
    case Momentum::kFirstNesterov: choose_decay<Momentum::kFirstNesterov, T>(row, span, options, streams); break;
  }
}

void sgd(const Row& row, Span span, const Sgd& options, bool streams) {
  has_float64(row) ? choose_momentum<double>(row, span, options, streams) : choose_momentum<float>(row, span, options, streams);
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
