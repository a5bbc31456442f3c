// The operations over lists of tensors on one device. Formulas: common/formulas.h; specification: sam_kernels.reference. Tensors of one row
// are dense, of one size and in one memory order. None waits for the device.
#pragma once

#include <cstdint>
#include <vector>

#include "common/options.h"
#include "common/roles.h"
#include "cuda/device.h"
#include "cuda/scalars.cuh"
#include "cuda/split.h"

namespace sam::cuda {

// Partial sums of rows, a float64 a chunk, in the order of rows: how many each row has. slice_sizes: as of RowLists.
std::vector<uint32_t> chunk_counts(const std::vector<int64_t>& numels, const std::vector<int64_t>* slice_sizes);

// What becomes of the sums of chunks. counter: of counter_of, whose last block does it; null: somebody else will.
struct FinishOptions {
  double* sums;  // (C,) device
  void* norms;   // (M,) device, float32 or float64
  bool is_double;
  float* found_inf;   // () device or null: set where the norm is not finite
  float* skipped;     // () device or null: what found_inf was is added to it, and found_inf starts anew
  uint32_t count;     // C, of one norm
  uint32_t* counter;  // () device
};
// Norms of consecutive groups of sums, in a launch of their own. bounds: (M + 1,) the sums of each.
void finish_norms(const FinishOptions& options, const std::vector<uint32_t>& bounds, const Place& place);

struct FinishDotsOptions {
  Dots* sums;         // (C,) device
  uint32_t count;     // C
  Dots* dots;         // () device
  float* found_inf;   // () device or null: set where one of the three is not finite
  uint32_t* counter;  // () device
};
void finish_dots(const FinishDotsOptions& options, const Place& place);

// Options of an operation with sums: each chunk's goes to finish.sums, at the tag of its row and the number of the chunk in it.
template <class Options, class Finish = FinishOptions>
struct Summed {
  Options options;
  Finish finish;
};

// These return whether the last of their launches has finished the sums: not without a counter, nor of lists without elements.

// Reads g (and p when adaptive).
using NormOptions = Summed<Scaling<double>>;
bool sum_squares(const RowLists<kNormRoles>& lists, const NormOptions& options, const Place& place);

// Reads g (and p when adaptive), writes g where a row has slices.
bool centralize(const RowLists<kNormRoles>& lists, const NormOptions& options, const Place& place);

// Reads g, m (and p when adaptive); writes m.
using DirectionLaunch = Summed<DirectionOptions<Scalar>>;
bool sum_direction(const RowLists<kDirectionRoles>& lists, const DirectionLaunch& options, const Place& place);

// Reads l, r (and o).
using DotsOptions = Summed<NoOptions, FinishDotsOptions>;
bool sum_dots(const RowLists<kDotsRoles>& lists, const DotsOptions& options, const Place& place);

// Reads l, r (and o); writes out.
using CombineLaunch = Summed<CombineOptions<Scalar>>;
bool combine(const RowLists<kCombineRoles>& lists, const CombineLaunch& options, const Place& place);

struct CheckOptions {
  float* found_inf;  // () device: set where a gradient is not finite
};
void check_finite(const RowLists<1>& lists, const CheckOptions& options, const Place& place);

// Reads p, g; writes old_p, p (from_old: reads old_p, g; writes p).
void perturb(const RowLists<kPerturbRoles>& lists, const PerturbOptions<Scalar>& options, const Place& place);
void perturb_variant(const RowLists<kPerturbVariantRoles>& lists, const PerturbVariantOptions<Scalar>& options, const Place& place);

// Reads p; writes old_p, p (from_old: reads old_p; writes p). Tags are the rows' numbers in the caller's list.
void random_perturb(const RowLists<kRandomRoles>& lists, const RandomOptions<Scalar>& options, const Place& place);

void copy(const RowLists<kCopyRoles>& lists, const NoOptions& options, const Place& place);

// Reads old_p (else p), g, m; writes p, m (to_old: and old_p). Tags: as of random_perturb where parameters are rounded stochastically.
void sgd(const RowLists<kSgdRoles>& lists, const SgdOptions<Scalar>& options, const Place& place);

struct AdamLaunch {
  AdamOptions<Scalar> options;
  double* corrections;  // (most tag + 1, 2) device: of the row tagged r: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
};
// Adds one to every step counter and writes the corrections, unless skipped.
void advance(const RowLists<1>& steps, const AdamLaunch& options, const Place& place);
// Reads old_p (else p), g, m, v; writes p, m, v (to_old: and old_p). Tags: as of sgd.
void adamw(const RowLists<kAdamRoles>& lists, const AdamLaunch& options, const Place& place);

}  // namespace sam::cuda
