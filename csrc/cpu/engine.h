// The CPU backend's operations over lists of tensors. They own the threads and the cutting of the work; the kernels own the arithmetic.
// Tensors of one row are dense, of one size and in one memory order. A role that takes no part is a null list.
#pragma once

#include <cstdint>
#include <vector>

#include "common/work_list.h"
#include "cpu/kernels.h"

namespace sam::cpu {

struct Lists {
  const TensorList* params = nullptr;
  const TensorList* grads = nullptr;
  const TensorList* old_params = nullptr;
  const TensorList* states[2] = {nullptr, nullptr};

  // Throws std::invalid_argument unless every list that takes part has the same sizes. Called before any memory is touched.
  void check() const;
};

// Norms of consecutive groups of rows, group_sizes (m,) rows each, in one pass.
std::vector<double> grad_norms(const Lists& lists, const std::vector<int64_t>& group_sizes, const NormArgs& args, int threads);
void perturb(const Lists& lists, PerturbArgs args, int threads);
// indices: (n,), which rows of the caller's list these are.
void perturb_variant(const Lists& lists, PerturbVariantArgs args, const std::vector<uint32_t>& indices, int threads);
double direction_norm(const Lists& lists, const DirectionArgs& args, int threads);
// slice_sizes: (n,), 0 for a tensor that is left as it is.
double centralize(const Lists& lists, const NormArgs& args, const std::vector<int64_t>& slice_sizes, int threads);
Dots grad_dots(const Lists& lists, int threads);
double combine(const Lists& lists, CombineArgs args, int threads);
void random_perturb(const Lists& lists, RandomPerturbArgs args, const std::vector<uint32_t>& indices, int threads);
void copy(const Lists& lists, CopyArgs args, int threads);
void sgd(const Lists& lists, SgdArgs args, int threads);
void adamw(const Lists& lists, AdamArgs args, const std::vector<double>& steps, int threads);  // steps: (n,), 1 on the first

}  // namespace sam::cpu
