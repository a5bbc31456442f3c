// Every update formula, once: scalar, one element at a time, the same source for the host and for CUDA.
//
// T is the arithmetic type: float for float32, bfloat16 and float16 storage, double for float64 storage. Callers convert storage to T
// before and round once after. Nothing here may be contracted into a fused multiply-add (the build says -ffp-contract=off), so the bits
// are the same on every instruction set. Symbols follow docs/internals/contracts.md and the papers: rho, lambd, eps, eta.
#pragma once

#include <cmath>

#include "common/bits.h"

namespace sam {

template <class T>
SAM_INLINE bool is_finite(T value) {
  return value - value == T(0);
}

// 1 / grad_scale folded in: norm and gradient are those of the scaled loss, the perturbation is that of the unscaled one.
//   s = rho * (1 - lambd + lambd / (norm / grad_scale + eps)) / grad_scale
template <class T>
SAM_INLINE T perturb_scale(T norm, T rho, T lambd, T eps, T inv_grad_scale) {
  return rho * ((T(1) - lambd) + lambd / (norm * inv_grad_scale + eps)) * inv_grad_scale;
}

// ASAM's normalisation operator T_w = |p| + eta, where it is asked for.
template <class T>
struct Scaling {
  bool is_adaptive;
  T eta;

  SAM_INLINE T weight(T param) const { return std::fabs(param) + eta; }

  // Rounded once, before the loops.
  template <class To>
  SAM_INLINE Scaling<To> as() const {
    return {is_adaptive, To(eta)};
  }
};

// p + s g
template <class T>
SAM_INLINE T perturb(T param, T grad, T scale) {
  return param + grad * scale;
}

// p + s T_w^2 g
template <class T>
SAM_INLINE T perturb_adaptive(T param, T grad, T scale, const Scaling<T>& scaling) {
  const T weight = scaling.weight(param);
  return param + weight * weight * grad * scale;
}

// One or the other.
template <class T>
SAM_INLINE T perturb(T param, T grad, T scale, const Scaling<T>& scaling) {
  return scaling.is_adaptive ? perturb_adaptive(param, grad, scale, scaling) : perturb(param, grad, scale);
}

// Gradient centralisation (arXiv 2004.01461): the mean is that of the elements which share an index of the first dimension.
template <class T>
SAM_INLINE T centralized(T grad, T mean) {
  return grad - mean;
}

// Directions made of a gradient and a moving average of earlier ones, m: VaSSO (arXiv 2309.15639) and Friendly SAM (arXiv 2403.12350).
enum class Direction { kVasso, kFriendly };

template <class T>
struct DirectionConstants {
  T inv_grad_scale;
  T decay, gain;  // m <- decay m + gain g: 1 - theta, theta (VaSSO); lmbda, 1 - lmbda (Friendly SAM)
  T sigma;
};

// Returns the direction; ema is read (unless this is its first step) and written, except where the gradient is not finite: one step that is
// skipped must not poison those after it. The direction is then not finite, so the step is skipped.
template <Direction kDirection, bool kFirst, class T>
SAM_INLINE T update_direction(T grad, T& ema, const DirectionConstants<T>& c) {
  grad = grad * c.inv_grad_scale;
  const T before = kFirst ? T(0) : ema;
  const T after = kFirst ? grad : before * c.decay + grad * c.gain;
  ema = is_finite(grad) ? after : before;
  if constexpr (kFirst || kDirection == Direction::kVasso) return after;
  return grad - c.sigma * before;
}

// One term of a squared norm, or of an inner product. Always in double: the product of two float32 numbers is exact in it, so neither
// overflow nor cancellation of tiny terms can happen, and a CPU pass is bound by memory either way.
SAM_INLINE double norm_term(double grad) { return grad * grad; }

SAM_INLINE double dot_term(double left, double right) { return left * right; }

// Sums of l^2, l d and d^2.
struct Dots {
  double left, product, right;

  SAM_INLINE Dots& operator+=(const Dots& other) {
    left += other.left, product += other.product, right += other.right;
    return *this;
  }
};

SAM_INLINE double norm_term_adaptive(double param, double grad, const Scaling<double>& scaling) {
  const double scaled = scaling.weight(param) * grad;
  return scaled * scaled;
}

// One or the other; param is read only where it counts.
SAM_INLINE double norm_term(double param, double grad, const Scaling<double>& scaling) {
  return scaling.is_adaptive ? norm_term_adaptive(param, grad, scaling) : norm_term(grad);
}

// What the descent rules of GSAM (arXiv 2203.08065), WSAM (arXiv 2305.15817), LookSAM (arXiv 2203.02714), SAM-SPS and RSAM are made of.
template <class T>
struct CombineWeights {
  T left, right, origin;
};

// a l + (b r + c o). In this order: with b = 1 and c = -1 the difference of two close numbers is formed first, and is exact.
template <bool kOrigin, class T>
SAM_INLINE T combine(T left, T right, T origin, const CombineWeights<T>& weights) {
  T sum = weights.right * right;
  if constexpr (kOrigin) sum = sum + weights.origin * origin;
  return weights.left * left + sum;
}

// torch.nn.utils.clip_grad_norm_: min(1, max_norm / (norm + 1e-6)), on the unscaled norm.
template <class T>
SAM_INLINE T clip_factor(T norm, T max_norm, T inv_grad_scale) {
  const T factor = max_norm / (norm * inv_grad_scale + T(1e-6));
  return factor < T(1) ? factor : T(1);
}

// What the gradient is multiplied by before anything else: 1 / grad_scale, the clip factor (where there is one) and the sign of maximize.
template <class T>
SAM_INLINE T grad_multiplier(bool maximize, T inv_grad_scale, T clip) {
  return (maximize ? T(-1) : T(1)) * inv_grad_scale * clip;
}

enum class Momentum { kNone, kFirst, kPlain, kNesterov, kFirstNesterov };

// torch.optim.SGD. grad_multiplier carries 1 / grad_scale, the clip factor and the sign of maximize.
template <class T>
struct SgdConstants {
  T lr, momentum, one_minus_dampening, weight_decay, grad_multiplier;
};

// Returns the new parameter; buffer is read (unless this is its first step) and written.
template <class T>
SAM_INLINE T sgd_step(Momentum momentum, bool decays, T param, T grad, T& buffer, const SgdConstants<T>& c) {
  T update = grad * c.grad_multiplier;
  if (decays) update = update + c.weight_decay * param;
  if (momentum == Momentum::kFirst || momentum == Momentum::kFirstNesterov) {
    buffer = update;  // no dampening on the first step, as torch
  } else if (momentum != Momentum::kNone) {
    buffer = buffer * c.momentum + update * c.one_minus_dampening;
  }
  if (momentum == Momentum::kNesterov || momentum == Momentum::kFirstNesterov) {
    update = update + c.momentum * buffer;
  } else if (momentum != Momentum::kNone) {
    update = buffer;
  }
  return param - c.lr * update;
}

template <Momentum kMomentum, bool kWeightDecay, class T>
SAM_INLINE T sgd_step(T param, T grad, T& buffer, const SgdConstants<T>& c) {
  return sgd_step(kMomentum, kWeightDecay, param, grad, buffer, c);
}

enum class Decay { kNone, kL2, kDecoupled };

// In double whatever the storage, as torch computes them on the host.
struct BiasCorrections {
  double step_size;            // lr / (1 - beta1^t)
  double inv_sqrt_correction;  // 1 / sqrt(1 - beta2^t)
};

// step: t, 1 on the first.
SAM_INLINE BiasCorrections bias_corrections(double lr, double beta1, double beta2, double step) {
  return {lr / (1.0 - std::pow(beta1, step)), 1.0 / std::sqrt(1.0 - std::pow(beta2, step))};
}

// The factor of a in a moving average of a and b. From beta = 1/2 on it is 1: the average is a + (1 - beta) (b - a). Below it is beta: the
// average is beta a + (1 - beta) b, since the other form would err by half an ulp of a, which may be far longer than the average.
SAM_INLINE double average_factor(double beta) { return beta < 0.5 ? beta : 1.0; }

// Below 1/2 torch.lerp computes b - beta (b - a): NaN for an infinite b.
// ``mask``: all bits where the factor is 1, none below. A condition, which is the same for all elements, makes nvcc write the arithmetic of
// a loop twice.
template <class T>
SAM_INLINE T moving_average(T average, T value, T factor, T one_minus_beta, typename BitsOf<T>::type mask) {
  return average * factor + one_minus_beta * (value - masked(average, mask));
}

// torch.optim.Adam (kL2) and AdamW (kDecoupled); bias corrections are those of the step being made.
template <class T>
struct AdamConstants {
  T step_size, inv_sqrt_correction;
  T exp_avg_factor;                       // average_factor(beta1)
  typename BitsOf<T>::type exp_avg_mask;  // of moving_average
  T one_minus_beta1, beta2, one_minus_beta2, eps;
  T weight_decay;  // kL2: added to the gradient
  T decay_factor;  // kDecoupled: 1 - lr * weight_decay
  T grad_multiplier;
};

// Returns the new parameter; both moments are read and written.
template <Decay kDecay, class T>
SAM_INLINE T adamw_step(T param, T grad, T& exp_avg, T& exp_avg_sq, const AdamConstants<T>& c) {
  grad = grad * c.grad_multiplier;
  if constexpr (kDecay == Decay::kL2) grad = grad + c.weight_decay * param;
  if constexpr (kDecay == Decay::kDecoupled) param = param * c.decay_factor;
  exp_avg = moving_average(exp_avg, grad, c.exp_avg_factor, c.one_minus_beta1, c.exp_avg_mask);
  exp_avg_sq = exp_avg_sq * c.beta2 + c.one_minus_beta2 * grad * grad;
  const T denominator = std::sqrt(exp_avg_sq) * c.inv_sqrt_correction + c.eps;
  return param - c.step_size * (exp_avg / denominator);
}

}  // namespace sam
