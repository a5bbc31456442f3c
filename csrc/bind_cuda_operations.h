// Operations over lists on a device, from their values in Python. Everything is read before the interpreter's lock is released.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <optional>
#include <stdexcept>
#include <utility>
#include <vector>

#include "cuda/config.h"
#include "cuda/operations.h"
#include "operation.h"
#include "tensor_list.h"

namespace sam::cuda {
namespace {

namespace py = pybind11;

using List = const PyTensorList*;
// A Python number, a tensor of one element that the device reads, or None.
Scalar scalar_of(const py::object& value, double otherwise = 0.0) {
  if (value.is_none()) return {otherwise};
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) return {value.cast<double>()};
  const Operand operand = scalar_operand(value);
  return {0.0, operand.data, operand.dtype == DType::kFloat64};
}

Scalar scalar(const PyOperation& op, const char* field, double otherwise = 0.0) { return scalar_of(op.value(field), otherwise); }

// A flag that the device writes; null for None.
float* flag_address(const PyOperation& op, const char* field) {
  const py::object flag = op.value(field);
  if (flag.is_none()) return nullptr;
  const Operand operand = scalar_operand(flag);
  if (operand.dtype != DType::kFloat32) throw py::type_error("a flag must be float32");
  return static_cast<float*>(operand.data);
}

template <class T>
T* pointer(uintptr_t address) {
  return reinterpret_cast<T*>(address);
}

void* stream_of(uintptr_t stream) { return pointer<void>(stream); }

// The place of an operation on the list's device, made the current one; other threads may run while the launch waits for room.
struct Launch {
  Launch(const char* op, List list, uintptr_t stream) : place{op, list->device, stream_of(stream)}, guard(place) {}

  Place place;
  py::gil_scoped_release release;
  DeviceGuard guard;
};

Multiplier multiplier_of(const PyOperation& op) {
  return {.norm = scalar(op, "norm"),
          .grad_scale = scalar(op, "grad_scale", 1.0),
          .max_norm = op.number_or("max_norm", -1.0),
          .maximize = op.flag("maximize")};
}

uint32_t low(uint64_t seed) { return static_cast<uint32_t>(seed); }
uint32_t high(uint64_t seed) { return static_cast<uint32_t>(seed >> 32); }

// The first of each row's partial sums, and how many there are.
std::pair<std::vector<uint32_t>, uint32_t> first_sums(List list, const std::vector<int64_t>* slice_sizes = nullptr) {
  std::vector<uint32_t> firsts = chunk_counts(list->numels, slice_sizes);
  uint32_t total = 0;
  for (uint32_t& first : firsts) {
    const uint32_t count = first;
    first = total;
    total += count;
  }
  return {std::move(firsts), total};
}

// The sums of each group of consecutive rows. group_sizes: (M,) rows.
std::vector<uint32_t> bounds_of(const std::vector<uint32_t>& firsts, uint32_t total, const std::vector<int64_t>& group_sizes) {
  std::vector<uint32_t> bounds = {0};
  std::size_t row = 0;
  for (const int64_t size : group_sizes) {
    row += static_cast<std::size_t>(size);
    if (row > firsts.size()) throw std::invalid_argument("groups of more rows than there are");
    bounds.push_back(row == firsts.size() ? total : firsts[row]);
  }
  return bounds;
}

// Memory on the device that the caller has made for the results of sums.
struct Sums {
  uintptr_t sums, result;
  bool is_double;  // the result; of inner products always
};

// One norm is finished by the launch that makes its sums, several by one of their own.
FinishOptions finish_of(const Sums& memory, float* found_inf, float* skipped, const std::vector<uint32_t>& bounds, const Place& place) {
  return {.sums = pointer<double>(memory.sums),
          .norms = pointer<void>(memory.result),
          .is_double = memory.is_double,
          .found_inf = found_inf,
          .skipped = skipped,
          .count = bounds.back(),
          .counter = bounds.size() == 2 ? counter_of(place) : nullptr};
}

void expect(bool holds, const char* what) {
  if (!holds) throw std::invalid_argument(what);
}

void grad_norms(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  const List grads = op.list("grads"), params = op.list("params");
  const auto [firsts, total] = first_sums(grads);
  const auto bounds = bounds_of(firsts, total, op.integers("group_sizes"));
  const double eta = op.number("eta");
  const bool adaptive = op.flag("adaptive");
  float *found_inf = flag_address(op, "found_inf"), *skipped = flag_address(op, "skipped");
  const Launch launch("grad_norms", grads, stream);
  const FinishOptions finish = finish_of(memory, found_inf, skipped, bounds, launch.place);
  const NormOptions options{.eta = eta, .adaptive = adaptive, .sums = pointer<double>(memory.sums), .finish = finish};
  if (!sum_squares({{grads, params}, &firsts}, options, launch.place)) finish_norms(finish, bounds, launch.place);
}

void direction_norm(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  const List grads = op.list("grads"), ema = op.list("ema"), params = op.list("params");
  const auto [firsts, total] = first_sums(grads);
  const std::vector<uint32_t> bounds = {0, total};
  DirectionOptions options{.grad_scale = scalar(op, "grad_scale", 1.0),
                           .decay = op.number("decay"),
                           .gain = op.number("gain"),
                           .sigma = op.number("sigma"),
                           .eta = op.number("eta"),
                           .adaptive = op.flag("adaptive"),
                           .friendly = op.equals("kind", "friendly"),
                           .first_step = op.flag("first_step"),
                           .sums = pointer<double>(memory.sums),
                           .finish = {}};
  const Launch launch("direction_norm_", grads, stream);
  options.finish = finish_of(memory, nullptr, nullptr, bounds, launch.place);
  if (!sum_direction({{grads, ema, params}, &firsts}, options, launch.place)) finish_norms(options.finish, bounds, launch.place);
}

void grad_dots(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  const List lefts = op.list("lefts"), rights = op.list("rights"), origins = op.list("origins");
  const auto [firsts, total] = first_sums(lefts);
  float* found_inf = flag_address(op, "found_inf");
  const Launch launch("grad_dots", lefts, stream);
  const FinishDotsOptions finish{.sums = pointer<Dots>(memory.sums),
                                 .count = total,
                                 .dots = pointer<Dots>(memory.result),
                                 .found_inf = found_inf,
                                 .counter = counter_of(launch.place)};
  const DotsOptions options{.sums = pointer<Dots>(memory.sums), .finish = finish};
  if (!sum_dots({{lefts, rights, origins}, &firsts}, options, launch.place)) finish_dots(finish, launch.place);
}

// found_inf is read first and set last.
void combine_rows(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  const List outs = op.list("outs"), lefts = op.list("lefts"), rights = op.list("rights"), origins = op.list("origins");
  const auto [firsts, total] = first_sums(outs);
  const std::vector<uint32_t> bounds = {0, total};
  CombineOptions options{.left = scalar(op, "left_weight"),
                         .right = scalar(op, "right_weight"),
                         .origin = scalar(op, "origin_weight"),
                         .found_inf = scalar(op, "found_inf"),
                         .sums = pointer<double>(memory.sums),
                         .finish = {}};
  float* found_inf = flag_address(op, "found_inf");
  const Launch launch("combine_", outs, stream);
  options.finish = finish_of(memory, found_inf, nullptr, bounds, launch.place);
  if (!combine({{outs, lefts, rights, origins}, &firsts}, options, launch.place)) finish_norms(options.finish, bounds, launch.place);
}

void centralize_rows(const PyOperation& op, const std::vector<int64_t>& slice_sizes, const Sums& memory, uintptr_t stream) {
  const List grads = op.list("grads"), params = op.list("params");
  const auto [firsts, total] = first_sums(grads, &slice_sizes);
  const std::vector<uint32_t> bounds = {0, total};
  const double eta = op.number("eta");
  const bool adaptive = op.flag("adaptive");
  float* found_inf = flag_address(op, "found_inf");
  const Launch launch("centralize_", grads, stream);
  const FinishOptions finish = finish_of(memory, found_inf, nullptr, bounds, launch.place);
  const NormOptions options{.eta = eta, .adaptive = adaptive, .sums = pointer<double>(memory.sums), .finish = finish};
  if (!centralize({{grads, params}, &firsts, &slice_sizes}, options, launch.place)) finish_norms(finish, bounds, launch.place);
}

void perturb_rows(const PyOperation& op, const py::object& indices, uintptr_t stream) {
  const List params = op.list("params"), grads = op.list("grads"), old_params = op.list("old_params"), ema = op.list("ema");
  const PerturbOptions options{.norm = scalar(op, "norm"),
                               .rho = scalar(op, "rho"),
                               .lambd = scalar(op, "lambd"),
                               .grad_scale = scalar(op, "grad_scale", 1.0),
                               .found_inf = scalar(op, "found_inf"),
                               .eps = op.number("eps"),
                               .eta = op.number("eta"),
                               .adaptive = op.flag("adaptive"),
                               .from_old = op.flag("from_old")};
  const bool stochastic = !op.is_none("rounding_seed");
  if (ema == nullptr && !stochastic) {
    const Launch launch("perturb_", params, stream);
    perturb({{params, grads, old_params}}, options, launch.place);
    return;
  }
  const uint64_t seed = op.seed("rounding_seed");
  PerturbVariantOptions variant{};
  static_cast<PerturbOptions&>(variant) = options;
  variant.grad_weight = op.number("grad_weight");
  variant.ema_weight = op.number("ema_weight");
  variant.stochastic = stochastic;
  variant.key_low = low(seed);
  variant.key_high = high(seed);
  const auto rows = indices.cast<std::vector<uint32_t>>();
  const Launch launch("perturb_", params, stream);
  perturb_variant({{params, grads, old_params, ema}, stochastic ? &rows : nullptr}, variant, launch.place);
}

void random_perturb_rows(const PyOperation& op, const std::vector<uint32_t>& rows, uintptr_t stream) {
  const List params = op.list("params"), old_params = op.list("old_params");
  const uint64_t seed = op.seed("seed");
  const RandomOptions options{.scale = scalar(op, "scale"),
                              .key_low = low(seed),
                              .key_high = high(seed),
                              .normal = op.equals("distribution", "normal"),
                              .from_old = op.flag("from_old")};
  const Launch launch("random_perturb_", params, stream);
  random_perturb({{params, old_params}, &rows}, options, launch.place);
}

void sgd_rows(const PyOperation& op, uintptr_t stream) {
  const List params = op.list("params");
  const RowLists<kSgdRoles> lists{{params, op.list("grads"), op.list("old_params"), op.list("momentum_buffers")}};
  const SgdLaunch options{.lr = scalar(op, "lr"),
                          .found_inf = scalar(op, "found_inf"),
                          .multiplier = multiplier_of(op),
                          .momentum = op.number("momentum"),
                          .dampening = op.number("dampening"),
                          .weight_decay = op.number("weight_decay"),
                          .nesterov = op.flag("nesterov"),
                          .first_step = op.flag("first_step")};
  const Launch launch("sgd_step_", params, stream);
  sgd(lists, options, launch.place);
}

// corrections: the address of (n, 2) float64. state_steps: float32, advanced here.
void adamw_rows(const PyOperation& op, uintptr_t corrections, uintptr_t stream) {
  const List params = op.list("params"), steps = op.list("state_steps");
  expect(steps->operands.size() == params->operands.size(), "one step counter a tensor");
  if (!steps->only_float32) throw py::type_error("step counters must be float32");
  const RowLists<kAdamRoles> lists{{params, op.list("grads"), op.list("old_params"), op.list("exp_avgs"), op.list("exp_avg_sqs")}};
  const auto [beta1, beta2] = op.value("betas").cast<std::pair<double, double>>();
  const AdvanceOptions advanced{.lr = scalar(op, "lr"),
                                .norm = scalar(op, "norm"),
                                .found_inf = scalar(op, "found_inf"),
                                .beta1 = beta1,
                                .beta2 = beta2,
                                .corrections = pointer<double>(corrections)};
  const AdamLaunch options{.lr = advanced.lr,
                           .found_inf = advanced.found_inf,
                           .multiplier = multiplier_of(op),
                           .beta1 = beta1,
                           .beta2 = beta2,
                           .eps = op.number("eps"),
                           .weight_decay = op.number("weight_decay"),
                           .decoupled = op.flag("decoupled"),
                           .corrections = advanced.corrections};
  const Launch launch("adamw_step_", params, stream);
  lists.check();
  advance({{steps}}, advanced, launch.place);
  adamw(lists, options, launch.place);
}

}  // namespace
}  // namespace sam::cuda
