// The operations over lists of tensors on one device. Formulas: common/formulas.h; specification: sam_kernels.reference. Tensors of one row
// are dense, of one size and in one memory order. None waits for the device.
#pragma once

#include <cstdint>
#include <vector>

#include "cuda/device.h"
#include "cuda/scalars.cuh"
#include "cuda/split.h"

namespace sam::cuda {

// Partial sums of rows, a float64 a chunk, in the order of rows: how many each row has. slice_sizes: as of RowLists.
std::vector<uint32_t> chunk_counts(const std::vector<int64_t>& numels, const std::vector<int64_t>* slice_sizes);

// What becomes of the sums of chunks. counter: of counter_of, whose last block does it; null: somebody else will.
struct FinishOptions {
  const double* sums;  // (C,) device
  void* norms;         // (M,) device, float32 or float64
  bool is_double;
  float* found_inf;   // () device or null: set where the norm is not finite
  float* skipped;     // () device or null: what found_inf was is added to it, and found_inf starts anew
  uint32_t count;     // C, of one norm
  uint32_t* counter;  // () device
};
// Norms of consecutive groups of sums, in a launch of their own. bounds: (M + 1,) the sums of each.
void finish_norms(const FinishOptions& options, const std::vector<uint32_t>& bounds, const Place& place);

struct FinishDotsOptions {
  const Dots* sums;   // (C,) device
  uint32_t count;     // C
  Dots* dots;         // () device
  float* found_inf;   // () device or null: set where one of the three is not finite
  uint32_t* counter;  // () device
};
void finish_dots(const FinishDotsOptions& options, const Place& place);

// Operations with sums return whether the last of their launches has finished them: not without a counter, nor of lists without elements.

struct NormOptions {
  double eta;
  bool adaptive;
  double* sums;  // (C,) device: receives a sum of squares a chunk
  FinishOptions finish;
};
// Reads g (and p when adaptive).
enum NormRole { kNormGrad, kNormParam, kNormRoles };
bool sum_squares(const RowLists<kNormRoles>& lists, const NormOptions& options, const Place& place);

// Reads g (and p when adaptive), writes g where a row has slices.
bool centralize(const RowLists<kNormRoles>& lists, const NormOptions& options, const Place& place);

struct DirectionOptions {
  Scalar grad_scale;
  double decay, gain, sigma, eta;
  bool adaptive, friendly, first_step;
  double* sums;  // (C,) device
  FinishOptions finish;
};
// Reads g, m (and p when adaptive); writes m.
enum DirectionRole { kDirectionGrad, kDirectionEma, kDirectionParam, kDirectionRoles };
bool sum_direction(const RowLists<kDirectionRoles>& lists, const DirectionOptions& options, const Place& place);

struct DotsOptions {
  Dots* sums;  // (C,) device: receives three sums a chunk
  FinishDotsOptions finish;
};
// Reads l, r (and o).
enum DotsRole { kDotsLeft, kDotsRight, kDotsOrigin, kDotsRoles };
bool sum_dots(const RowLists<kDotsRoles>& lists, const DotsOptions& options, const Place& place);

struct CombineOptions {
  Scalar left, right, origin, found_inf;  // weights
  double* sums;                           // (C,) device
  FinishOptions finish;
};
// Reads l, r (and o); writes out.
enum CombineRole { kCombineOut, kCombineLeft, kCombineRight, kCombineOrigin, kCombineRoles };
bool combine(const RowLists<kCombineRoles>& lists, const CombineOptions& options, const Place& place);

struct CheckOptions {
  float* found_inf;  // () device: set where a gradient is not finite
};
void check_finite(const RowLists<1>& lists, const CheckOptions& options, const Place& place);

struct PerturbOptions {
  Scalar norm, rho, lambd, grad_scale, found_inf;
  double eps, eta;
  bool adaptive, from_old;
};
// Reads p, g; writes old_p, p (from_old: reads old_p, g; writes p).
enum PerturbRole { kParam, kGrad, kOldParam, kPerturbRoles };
void perturb(const RowLists<kPerturbRoles>& lists, const PerturbOptions& options, const Place& place);

struct PerturbVariantOptions : PerturbOptions {
  double grad_weight, ema_weight;  // the direction is grad_weight g / grad_scale + ema_weight m, where there is an m
  bool stochastic;                 // bfloat16 parameters are rounded stochastically
  uint32_t key_low, key_high;
};
enum PerturbVariantRole { kEma = kPerturbRoles, kPerturbVariantRoles };
void perturb_variant(const RowLists<kPerturbVariantRoles>& lists, const PerturbVariantOptions& options, const Place& place);

struct RandomOptions {
  Scalar scale;
  uint32_t key_low, key_high;
  bool normal, from_old;
};
// Reads p; writes old_p, p (from_old: reads old_p; writes p). Tags are the rows' numbers in the caller's list.
enum RandomRole { kRandomParam, kRandomOldParam, kRandomRoles };
void random_perturb(const RowLists<kRandomRoles>& lists, const RandomOptions& options, const Place& place);

struct CopyOptions {};
enum CopyRole { kDestination, kSource, kCopyRoles };
void copy(const RowLists<kCopyRoles>& lists, const CopyOptions& options, const Place& place);

struct SgdLaunch {
  Scalar lr, found_inf;
  Multiplier multiplier;
  double momentum, dampening, weight_decay;
  bool nesterov, first_step;
};
// Reads old_p (else p), g, m; writes p, m.
enum SgdRole { kBuffer = kPerturbRoles, kSgdRoles };
void sgd(const RowLists<kSgdRoles>& lists, const SgdLaunch& options, const Place& place);

struct AdvanceOptions {
  Scalar lr, norm, found_inf;
  double beta1, beta2;
  double* corrections;  // (R, 2) device: of the row tagged r: lr / (1 - beta1^t), 1 / sqrt(1 - beta2^t)
};
// Adds one to every step counter, unless skipped.
void advance(const RowLists<1>& steps, const AdvanceOptions& options, const Place& place);

struct AdamLaunch {
  Scalar lr, found_inf;
  Multiplier multiplier;
  double beta1, beta2, eps, weight_decay;
  bool decoupled;
  const double* corrections;  // (R, 2) device
};
// Reads old_p (else p), g, m, v; writes p, m, v.
enum AdamRole { kExpAvg = kPerturbRoles, kExpAvgSq, kAdamRoles };
void adamw(const RowLists<kAdamRoles>& lists, const AdamLaunch& options, const Place& place);

}  // namespace sam::cuda
