// Restore and torch.optim.SGD in one pass. Reads old_p, g, m; writes p, m: 5 N s bytes. Without old_param the step is made in place.
#include "cpu/block.h"

namespace sam::cpu {
inline namespace SAM_ISA {

template <Momentum kMomentum, bool kWeightDecay, class T>
static void sgd_chunk(const Row& row, Span span, const SgdArgs& args) {
  const SgdConstants<T> constants = sgd_constants<T>(args);
  const bool restores = row.old_param.data != nullptr;
  const Operand& source = restores ? row.old_param : row.param;
  const Operand& momentum = row.state[0];
  for_each_block(span, [&](int64_t begin, int count) {
    Buffer<T> param_buffer, grad_buffer, momentum_buffer, result_buffer;
    const T* grad = load(row.grad, begin, count, grad_buffer);
    const T* param = load(source, begin, count, param_buffer);
    T* result = restores ? result_buffer.data : target(row.param, begin, result_buffer);
    if constexpr (kMomentum == Momentum::kNone) {
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        T none{};
        result[i] = sgd_step<kMomentum, kWeightDecay>(param[i], grad[i], none, constants);
      }
    } else {
      T* buffer = target(momentum, begin, momentum_buffer);
      if constexpr (kMomentum == Momentum::kPlain || kMomentum == Momentum::kNesterov) load(momentum, begin, count, momentum_buffer);
#pragma omp simd
      for (int i = 0; i < count; ++i) {
        result[i] = sgd_step<kMomentum, kWeightDecay>(param[i], grad[i], buffer[i], constants);
      }
      store(momentum, begin, count, buffer);
    }
    store(row.param, begin, count, result, restores && args.streaming);
  });
  stream_fence();
}

template <Momentum kMomentum, class T>
static void choose_decay(const Row& row, Span span, const SgdArgs& args) {
  if (args.weight_decay != 0) {
    sgd_chunk<kMomentum, true, T>(row, span, args);
  } else {
    sgd_chunk<kMomentum, false, T>(row, span, args);
  }
}

template <class T>
static void choose_momentum(const Row& row, Span span, const SgdArgs& args) {
  if (row.state[0].data == nullptr) {
    choose_decay<Momentum::kNone, T>(row, span, args);
  } else if (args.nesterov) {
    args.first_step ? choose_decay<Momentum::kFirstNesterov, T>(row, span, args) : choose_decay<Momentum::kNesterov, T>(row, span, args);
  } else {
    args.first_step ? choose_decay<Momentum::kFirst, T>(row, span, args) : choose_decay<Momentum::kPlain, T>(row, span, args);
  }
}

void sgd(const Row& row, Span span, const SgdArgs& args) {
  if (has_float64(row)) {
    choose_momentum<double>(row, span, args);
  } else {
    choose_momentum<float>(row, span, args);
  }
}

}  // namespace SAM_ISA
}  // namespace sam::cpu
