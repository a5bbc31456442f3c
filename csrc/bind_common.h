// What both bindings share: the options and lists of each operation, read from its value in Python with the interpreter's lock (Number: as
// of common/options.h), and checks of tensors that have no operation.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <utility>
#include <vector>

#include "common/options.h"
#include "common/roles.h"
#include "operation.h"
#include "tensor_list.h"

namespace sam {

using List = const PyTensorList*;

inline void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

// tensors: norms, weights, of one dtype; of draws the int64 indices too, under the name of float64, the only ones of 64 bits that a list
// has.
inline void expect_norms(List tensors, std::size_t count) {
  const std::vector<Operand>& operands = tensors->operands;
  expect(operands.size() == count && tensors->non_contiguous.empty() && tensors->numels[0] > 0, "norms and what is written, contiguous");
  expect(operands[0].dtype == operands[1].dtype, "norms and weights: dtype");
  expect(operands[0].dtype == DType::kFloat64 || operands[0].dtype == DType::kFloat32, "norms: float32 or float64");
}

inline void expect_weights(List tensors) {
  expect_norms(tensors, 2);
  expect(tensors->numels[1] == tensors->numels[0], "weights: size");
}

// Returns the number of draws.
inline int64_t expect_draws(List tensors, bool replacement) {
  expect_norms(tensors, 3);
  const int64_t draws = tensors->numels[2];
  expect(tensors->operands[2].dtype == DType::kFloat64, "indices: of 64 bits");
  expect(tensors->numels[1] == draws && draws > 0 && (replacement || draws <= tensors->numels[0]), "weights and indices: size");
  return draws;
}

// By role.
constexpr const char* kNormLists[kNormRoles] = {"grads", "params"};
constexpr const char* kDirectionLists[kDirectionRoles] = {"grads", "ema", "params"};
constexpr const char* kDotsLists[kDotsRoles] = {"lefts", "rights", "origins"};
constexpr const char* kCombineLists[kCombineRoles] = {"outs", "lefts", "rights", "origins"};
constexpr const char* kPerturbLists[kPerturbRoles] = {"params", "grads", "old_params"};
constexpr const char* kPerturbVariantLists[kPerturbVariantRoles] = {"params", "grads", "old_params", "ema"};
constexpr const char* kRandomLists[kRandomRoles] = {"params", "old_params"};
constexpr const char* kSgdLists[kSgdRoles] = {"params", "grads", "old_params", "momentum_buffers"};
constexpr const char* kAdamLists[kAdamRoles] = {"params", "grads", "old_params", "exp_avgs", "exp_avg_sqs"};

inline Scaling<double> read_scaling(const PyOperation& op) { return {.is_adaptive = op.flag("adaptive"), .eta = op.number("eta")}; }

template <class Number>
Number read_grad_scale(const PyOperation& op) {
  return op.scalar<Number>("grad_scale", 1.0);
}

template <class Number>
StepScalars<Number> read_step(const PyOperation& op) {
  return {.norm = op.scalar<Number>("norm"), .found_inf = op.scalar<Number>("found_inf"), .grad_scale = read_grad_scale<Number>(op)};
}

template <class Number>
PerturbOptions<Number> read_perturb(const PyOperation& op) {
  return {.step = read_step<Number>(op),
          .rho = op.scalar<Number>("rho"),
          .lambd = op.scalar<Number>("lambd"),
          .eps = op.number("eps"),
          .scaling = read_scaling(op),
          .from_old = op.flag("from_old")};
}

// Nothing but a gradient, rounded to nearest, is what most ascents are along.
inline bool is_variant(const PyOperation& op) { return op.list("ema") != nullptr || !op.is_none("rounding_seed"); }

template <class Number>
PerturbVariantOptions<Number> read_perturb_variant(const PyOperation& op) {
  return {.ascent = read_perturb<Number>(op),
          .grad_weight = op.number("grad_weight"),
          .ema_weight = op.number("ema_weight"),
          .is_stochastic = !op.is_none("rounding_seed"),
          .seed = op.seed("rounding_seed")};
}

template <class Number>
RandomOptions<Number> read_random(const PyOperation& op) {
  return {.scale = op.scalar<Number>("scale"),
          .seed = op.seed("seed"),
          .is_normal = op.equals("distribution", "normal"),
          .from_old = op.flag("from_old")};
}

template <class Number>
DirectionOptions<Number> read_direction(const PyOperation& op) {
  return {.grad_scale = read_grad_scale<Number>(op),
          .decay = op.number("decay"),
          .gain = op.number("gain"),
          .sigma = op.number("sigma"),
          .scaling = read_scaling(op),
          .is_friendly = op.equals("kind", "friendly"),
          .first_step = op.flag("first_step")};
}

template <class Number>
CombineOptions<Number> read_combine(const PyOperation& op) {
  return {.left = op.scalar<Number>("left_weight"),
          .right = op.scalar<Number>("right_weight"),
          .origin = op.scalar<Number>("origin_weight"),
          .found_inf = op.scalar<Number>("found_inf")};
}

template <class Number>
UpdateOptions<Number> read_update(const PyOperation& op) {
  return {.step = read_step<Number>(op),
          .lr = op.scalar<Number>("lr"),
          .max_norm = op.number_or("max_norm", -1.0),
          .weight_decay = op.number("weight_decay"),
          .maximize = op.flag("maximize"),
          .to_old = op.flag("to_old"),
          .is_stochastic = !op.is_none("rounding_seed"),
          .seed = op.seed("rounding_seed")};
}

template <class Number>
SgdOptions<Number> read_sgd(const PyOperation& op) {
  return {.update = read_update<Number>(op),
          .momentum = op.number("momentum"),
          .dampening = op.number("dampening"),
          .nesterov = op.flag("nesterov"),
          .first_step = op.flag("first_step")};
}

template <class Number>
AdamOptions<Number> read_adam(const PyOperation& op) {
  const auto [beta1, beta2] = op.value("betas").cast<std::pair<double, double>>();
  return {.update = read_update<Number>(op), .beta1 = beta1, .beta2 = beta2, .eps = op.number("eps"), .decoupled = op.flag("decoupled")};
}

}  // namespace sam
