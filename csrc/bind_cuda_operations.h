// Operations over lists on a device, from their values in Python. Everything is read before the interpreter's lock is released.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <stdexcept>
#include <utility>
#include <vector>

#include "bind_common.h"
#include "cuda/config.h"
#include "cuda/operations.h"

namespace sam::cuda {
namespace {

namespace py = pybind11;

// A Python number, a tensor of one element that the device reads, or None.
Scalar scalar_of(const py::object& value, double otherwise = 0.0) {
  if (value.is_none()) return {otherwise};
  if (PyFloat_Check(value.ptr()) || PyLong_Check(value.ptr())) return {value.cast<double>()};
  const Operand operand = scalar_operand(value);
  return {0.0, operand.data, operand.dtype == DType::kFloat64};
}

}  // namespace
}  // namespace sam::cuda

template <>
inline sam::cuda::Scalar sam::PyOperation::scalar<sam::cuda::Scalar>(const char* field, double otherwise) const {
  return cuda::scalar_of(value(field), otherwise);
}

namespace sam::cuda {
namespace {

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
  Launch(const char* op, const TensorList* list, uintptr_t stream) : place{op, list->device, stream_of(stream)}, guard(place) {}

  Place place;
  py::gil_scoped_release release;
  DeviceGuard guard;
};

// The first of each row's partial sums, and how many there are.
std::pair<std::vector<uint32_t>, uint32_t> first_sums(const TensorList* list, const std::vector<int64_t>* slice_sizes = nullptr) {
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

// Flags on the device, or null.
struct Flags {
  float *found_inf = nullptr, *skipped = nullptr;
};

// An operation over lists that makes norms: of all rows, or of each group of them. One is finished by the launch that makes its sums,
// several by one of their own.
template <int kRoles, class Options>
void run_norms(const char* op, bool (*run)(const RowLists<kRoles>&, const Summed<Options>&, const Place&),
               const std::array<const TensorList*, std::size_t{kRoles}>& lists, const Options& options, const Flags& flags,
               const Sums& memory, uintptr_t stream, const std::vector<int64_t>* group_sizes = nullptr,
               const std::vector<int64_t>* slice_sizes = nullptr) {
  const auto [firsts, total] = first_sums(lists[0], slice_sizes);
  const auto bounds = group_sizes == nullptr ? std::vector<uint32_t>{0, total} : bounds_of(firsts, total, *group_sizes);
  const Launch launch(op, lists[0], stream);
  const FinishOptions finish{.sums = pointer<double>(memory.sums),
                             .norms = pointer<void>(memory.result),
                             .is_double = memory.is_double,
                             .found_inf = flags.found_inf,
                             .skipped = flags.skipped,
                             .count = bounds.back(),
                             .counter = bounds.size() == 2 ? counter_of(launch.place) : nullptr};
  if (!run({lists, &firsts, slice_sizes}, {options, finish}, launch.place)) finish_norms(finish, bounds, launch.place);
}

void grad_norms(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  const Flags flags{.found_inf = flag_address(op, "found_inf"), .skipped = flag_address(op, "skipped")};
  const std::vector<int64_t> group_sizes = op.integers("group_sizes");
  run_norms("grad_norms", sum_squares, op.lists(kNormLists), read_scaling(op), flags, memory, stream, &group_sizes);
}

void direction_norm(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  run_norms("direction_norm_", sum_direction, op.lists(kDirectionLists), read_direction<Scalar>(op), {}, memory, stream);
}

// found_inf is read first and set last.
void combine_rows(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  const Flags flags{.found_inf = flag_address(op, "found_inf")};
  run_norms("combine_", combine, op.lists(kCombineLists), read_combine<Scalar>(op), flags, memory, stream);
}

void centralize_rows(const PyOperation& op, const std::vector<int64_t>& slice_sizes, const Sums& memory, uintptr_t stream) {
  const Flags flags{.found_inf = flag_address(op, "found_inf")};
  run_norms("centralize_", centralize, op.lists(kNormLists), read_scaling(op), flags, memory, stream, nullptr, &slice_sizes);
}

void grad_dots(const PyOperation& op, const Sums& memory, uintptr_t stream) {
  const auto lists = op.lists(kDotsLists);
  const auto [firsts, total] = first_sums(lists[0]);
  float* found_inf = flag_address(op, "found_inf");
  const Launch launch("grad_dots", lists[0], stream);
  const FinishDotsOptions finish{.sums = pointer<Dots>(memory.sums),
                                 .count = total,
                                 .dots = pointer<Dots>(memory.result),
                                 .found_inf = found_inf,
                                 .counter = counter_of(launch.place)};
  if (!sum_dots({lists, &firsts}, {{}, finish}, launch.place)) finish_dots(finish, launch.place);
}

void check_finite_rows(const PyOperation& op, uintptr_t stream) {
  const List grads = op.list("grads");
  const CheckOptions options{.found_inf = flag_address(op, "found_inf")};
  const Launch launch("check_finite_", grads, stream);
  check_finite({{grads}}, options, launch.place);
}

void perturb_rows(const PyOperation& op, const py::object& indices, uintptr_t stream) {
  if (is_variant(op)) {
    const auto lists = op.lists(kPerturbVariantLists);
    const auto options = read_perturb_variant<Scalar>(op);
    const auto rows = indices.cast<std::vector<uint32_t>>();
    const Launch launch("perturb_", lists[0], stream);
    perturb_variant({lists, options.is_stochastic ? &rows : nullptr}, options, launch.place);
  } else {
    const auto lists = op.lists(kPerturbLists);
    const auto options = read_perturb<Scalar>(op);
    const Launch launch("perturb_", lists[0], stream);
    perturb({lists}, options, launch.place);
  }
}

void random_perturb_rows(const PyOperation& op, const py::object& indices, uintptr_t stream) {
  const auto lists = op.lists(kRandomLists);
  const auto options = read_random<Scalar>(op);
  const auto rows = indices.cast<std::vector<uint32_t>>();
  const Launch launch("random_perturb_", lists[0], stream);
  random_perturb({lists, &rows}, options, launch.place);
}

// Kernels write backups where they are float32 masters of 16-bit parameters.
template <std::size_t kRoles>
void expect_masters(const UpdateOptions<Scalar>& options, const std::array<const TensorList*, kRoles>& lists) {
  if (!options.to_old) return;
  expect(lists[kOldParam] != nullptr, "to_old needs old_params");
  check_sizes(lists);
  for (std::size_t i = 0; i < lists[kParam]->operands.size(); ++i) {
    const bool is_master = lists[kOldParam]->operands[i].dtype == DType::kFloat32;
    expect(is_master && element_size(lists[kParam]->operands[i].dtype) == 2, "to_old: float32 old_params of 16-bit params");
  }
}

// The rows' numbers in the caller's list, where an update makes random numbers of them; empty otherwise.
std::vector<uint32_t> rows_of(const UpdateOptions<Scalar>& options, const py::object& indices) {
  return options.is_stochastic ? indices.cast<std::vector<uint32_t>>() : std::vector<uint32_t>{};
}

void sgd_rows(const PyOperation& op, const py::object& indices, uintptr_t stream) {
  const auto lists = op.lists(kSgdLists);
  const auto options = read_sgd<Scalar>(op);
  expect_masters(options.update, lists);
  const auto rows = rows_of(options.update, indices);
  const Launch launch("sgd_step_", lists[0], stream);
  sgd({lists, options.update.is_stochastic ? &rows : nullptr}, options, launch.place);
}

// corrections: the address of (n, 2) float64, of as many rows as the caller's list has where parameters are rounded stochastically.
// state_steps: float32, advanced here.
void adamw_rows(const PyOperation& op, const py::object& indices, uintptr_t corrections, uintptr_t stream) {
  const List steps = op.list("state_steps");
  const AdamLaunch options{.options = read_adam<Scalar>(op), .corrections = pointer<double>(corrections)};
  const auto rows = rows_of(options.options.update, indices);
  const auto* tags = options.options.update.is_stochastic ? &rows : nullptr;
  const RowLists<kAdamRoles> lists{op.lists(kAdamLists), tags};
  expect(steps->numels.size() == lists.numels().size(), "one step counter a tensor");
  if (!steps->only_float32) throw py::type_error("step counters must be float32");
  expect_masters(options.options.update, lists.roles);
  const Launch launch("adamw_step_", lists.roles[0], stream);
  lists.check();
  advance({{steps}, tags}, options, launch.place);
  adamw(lists, options, launch.place);
}

}  // namespace
}  // namespace sam::cuda
