// The options of operations as kernels take them, one struct for the host and for devices. Number is double on the host; on a device it is
// cuda::Scalar, which may lie in the device's memory. read(number) returns its value.
#pragma once

#include "common/formulas.h"
#include "common/random.h"

namespace sam {

SAM_INLINE double read(double number) { return number; }

struct NoOptions {};

// The scalars that a loss scaler and the norm of the gradients give to a step.
template <class Number>
struct StepScalars {
  Number norm, found_inf;  // 0 where there is none
  Number grad_scale;       // 1 where there is none
};

// The norm is not finite, or an earlier operation has set found_inf.
template <class Number>
SAM_INLINE bool is_skipped(const StepScalars<Number>& step) {
  return read(step.found_inf) != 0.0 || !is_finite(read(step.norm));
}

template <class Number>
SAM_INLINE double inverse_of(const Number& grad_scale) {
  return 1.0 / read(grad_scale);
}

template <class Number>
struct PerturbOptions {
  StepScalars<Number> step;
  Number rho, lambd;
  double eps;
  Scaling<double> scaling;
  bool from_old;  // read old_param, write param; otherwise read param, write both
};

// In double, rounded once by the caller: 1 - lambd cancels for the lambd close to 1 of the schedule 1 - 1/t. inv_grad_scale: 1 for a norm
// that is unscaled.
template <class Number>
SAM_INLINE double perturb_scale(const PerturbOptions<Number>& o, double inv_grad_scale) {
  return perturb_scale<double>(read(o.step.norm), read(o.rho), read(o.lambd), o.eps, inv_grad_scale);
}

template <class Number>
struct PerturbVariantOptions {
  PerturbOptions<Number> ascent;
  double grad_weight, ema_weight;  // the direction is grad_weight g / grad_scale + ema_weight m, where there is an m
  bool is_stochastic;              // bfloat16 parameters are rounded stochastically
  RandomSeed seed;
};

template <class Number>
struct RandomOptions {
  Number scale;
  RandomSeed seed;
  bool is_normal;  // otherwise -1 and +1
  bool from_old;   // as of PerturbOptions
};

template <class Number>
struct DirectionOptions {
  Number grad_scale;
  double decay, gain, sigma;
  Scaling<double> scaling;
  bool is_friendly, first_step;  // first_step: m is only written
};

template <class T, class Number>
SAM_INLINE DirectionConstants<T> direction_constants(const DirectionOptions<Number>& o) {
  return {T(inverse_of(o.grad_scale)), T(o.decay), T(o.gain), T(o.sigma)};
}

template <class Number>
struct CombineOptions {
  Number left, right, origin;  // weights
  Number found_inf;            // unless 0, only the sum of squares is wanted
};

template <class T, class Number>
SAM_INLINE CombineWeights<T> combine_weights(const CombineOptions<Number>& o) {
  return {T(read(o.left)), T(read(o.right)), T(read(o.origin))};
}

// What all updates have.
template <class Number>
struct UpdateOptions {
  StepScalars<Number> step;
  Number lr;
  double max_norm;  // negative: no clipping
  double weight_decay;
  bool maximize;
  bool to_old;         // the new weights are written to old_param, and to param in its type
  bool is_stochastic;  // bfloat16 parameters are rounded stochastically
  RandomSeed seed;
};

// Whether an update does more than the ordinary one.
template <class Number>
SAM_INLINE bool is_variant(const UpdateOptions<Number>& o) {
  return o.to_old || o.is_stochastic;
}

template <class Number>
SAM_INLINE double grad_multiplier(const UpdateOptions<Number>& o) {
  const double inverse = inverse_of(o.step.grad_scale);
  const double clip = o.max_norm < 0.0 ? 1.0 : clip_factor<double>(read(o.step.norm), o.max_norm, inverse);
  return grad_multiplier<double>(o.maximize, inverse, clip);
}

template <class Number>
struct SgdOptions {
  UpdateOptions<Number> update;
  double momentum, dampening;
  bool nesterov, first_step;  // first_step: momentum buffers are only written
};

template <class T, class Number>
SAM_INLINE SgdConstants<T> sgd_constants(const SgdOptions<Number>& o) {
  return {T(read(o.update.lr)), T(o.momentum), T(1.0 - o.dampening), T(o.update.weight_decay), T(grad_multiplier(o.update))};
}

template <class Number>
SAM_INLINE Momentum momentum_of(const SgdOptions<Number>& o, bool has_buffer) {
  if (!has_buffer) return Momentum::kNone;
  if (o.nesterov) return o.first_step ? Momentum::kFirstNesterov : Momentum::kNesterov;
  return o.first_step ? Momentum::kFirst : Momentum::kPlain;
}

template <class Number>
struct AdamOptions {
  UpdateOptions<Number> update;
  double beta1, beta2, eps;
  bool decoupled;
};

template <class Number>
SAM_INLINE BiasCorrections bias_corrections(const AdamOptions<Number>& o, double step) {
  return bias_corrections(read(o.update.lr), o.beta1, o.beta2, step);
}

template <class Number>
SAM_INLINE Decay decay_of(const AdamOptions<Number>& o) {
  return o.update.weight_decay == 0.0 ? Decay::kNone : o.decoupled ? Decay::kDecoupled : Decay::kL2;
}

template <class T, class Number>
SAM_INLINE AdamConstants<T> adam_constants(const AdamOptions<Number>& o, const BiasCorrections& corrections) {
  AdamConstants<T> constants;
  constants.step_size = T(corrections.step_size);
  constants.inv_sqrt_correction = T(corrections.inv_sqrt_correction);
  constants.exp_avg_factor = T(average_factor(o.beta1));
  constants.exp_avg_mask = o.beta1 < 0.5 ? 0 : ~typename BitsOf<T>::type(0);
  constants.one_minus_beta1 = T(1.0 - o.beta1);
  constants.beta2 = T(o.beta2);
  constants.one_minus_beta2 = T(1.0 - o.beta2);
  constants.eps = T(o.eps);
  constants.weight_decay = T(o.update.weight_decay);
  constants.decay_factor = T(1.0 - read(o.update.lr) * o.update.weight_decay);
  constants.grad_multiplier = T(grad_multiplier(o.update));
  return constants;
}

}  // namespace sam
