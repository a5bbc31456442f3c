// The CPU backend's operations over lists of tensors. They own the threads and the cutting of the work; the kernels own the arithmetic.
// Tensors of one row are dense, of one size and in one memory order.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>
#include <vector>

#include "common/work_list.h"
#include "cpu/kernels.h"

namespace sam::cpu {

// Lists by role (common/roles.h). Null: takes no part.
struct Lists {
  template <std::size_t kRoles>
  Lists(const std::array<const TensorList*, kRoles>& given) {
    std::copy(given.begin(), given.end(), roles.begin());
  }

  const std::vector<int64_t>& numels() const { return roles[0]->numels; }

  std::array<const TensorList*, kMostRoles> roles{};
};

// Norms of consecutive groups of rows, group_sizes (m,) rows each, in one pass.
std::vector<double> grad_norms(const Lists& lists, const std::vector<int64_t>& group_sizes, const Scaling<double>& scaling, int threads);
// Whether all elements of the gradients are finite.
bool all_finite(const Lists& lists, int threads);
void perturb(const Lists& lists, const Perturb& options, int threads);
// indices: (n,), which rows of the caller's list these are.
void perturb_variant(const Lists& lists, const PerturbVariant& options, const std::vector<uint32_t>& indices, int threads);
double direction_norm(const Lists& lists, const MovingDirection& options, int threads);
// slice_sizes: (n,), 0 for a tensor that is left as it is.
double centralize(const Lists& lists, const Scaling<double>& scaling, const std::vector<int64_t>& slice_sizes, int threads);
Dots grad_dots(const Lists& lists, int threads);
double combine(const Lists& lists, const Combine& options, int threads);
void random_perturb(const Lists& lists, const RandomPerturb& options, const std::vector<uint32_t>& indices, int threads);
void copy(const Lists& lists, int threads);
void sgd(const Lists& lists, const Sgd& options, const std::vector<uint32_t>& indices, int threads);
// steps: (n,), 1 on the first.
void adamw(const Lists& lists, const Adam& options, const std::vector<double>& steps, const std::vector<uint32_t>& indices, int threads);

}  // namespace sam::cpu
