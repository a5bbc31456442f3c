// What one instruction set offers: a function a kernel that does one chunk of one row. The engine cuts the work and owns the threads.
// This header is seen by every instruction set's translation unit: plain structs and declarations only.
#pragma once

#include <cstdint>

#include "common/formulas.h"
#include "common/operand.h"
#include "cpu/layers.h"

namespace sam::cpu {

// The tensors of one parameter, all dense, of one size and in one memory order. Of combinations: param is the result, grad the left one,
// state[0] the right one, old_param the origin.
struct Row {
  Operand param, grad, old_param;
  Operand state[2];  // momentum buffer | exp_avg, exp_avg_sq | ema
};

struct NormArgs {
  bool adaptive;
  double eta;
};

struct CentralizeArgs : NormArgs {
  int64_t slice_size;  // elements that share a mean; a span is made of whole slices
};

struct PerturbArgs {
  double norm, rho, lambd, eps, eta, inv_grad_scale;
  bool adaptive;
  bool from_old;   // read old_param, write param; otherwise read param, write both
  bool streaming;  // write-only outputs bypass the caches
};

struct CopyArgs {
  bool save;  // old_param <- param; otherwise param <- old_param
  bool streaming;
};

// The seed as the two words of Philox's key, and the last word of its counters (csrc/common/random.h).
struct RandomKey {
  uint32_t low, high, stream;
};

struct PerturbVariantArgs : PerturbArgs {
  double grad_weight, ema_weight;  // the direction is grad_weight g / grad_scale + ema_weight m, where there is an m
  bool stochastic;                 // bfloat16 parameters are rounded stochastically
  RandomKey key;
};

struct DirectionArgs {
  bool adaptive, friendly, first_step;  // first_step: m is only written
  double eta, inv_grad_scale, decay, gain, sigma;
};

struct RandomPerturbArgs {
  RandomKey key;
  double scale;
  bool normal;     // otherwise -1 and +1
  bool from_old;   // read old_param, write param; otherwise read param, write both
  bool streaming;  // write-only outputs bypass the caches
};

struct SgdArgs : SgdOptions {
  bool nesterov, first_step, streaming;
};

struct AdamArgs : AdamOptions {
  bool decoupled, streaming;
};

struct CombineArgs {
  double left_weight, right_weight, origin_weight;
  bool writes;     // otherwise only the sum of squares is wanted
  bool streaming;  // write-only outputs bypass the caches
};

struct KernelTable {
  const char* name;
  double (*norm)(const Row&, Span, const NormArgs&);  // sum of squares
  void (*perturb)(const Row&, Span, const PerturbArgs&);
  void (*perturb_variant)(const Row&, Span, const PerturbVariantArgs&, uint32_t index);  // index: of the row in the caller's list
  double (*direction_norm)(const Row&, Span, const DirectionArgs&);                      // sum of squares
  double (*centralize)(const Row&, Span, const CentralizeArgs&);                         // sum of squares
  Dots (*grad_dots)(const Row&, Span);
  double (*combine)(const Row&, Span, const CombineArgs&);  // sum of squares
  void (*random_perturb)(const Row&, Span, const RandomPerturbArgs&, uint32_t index);
  void (*copy)(const Row&, Span, const CopyArgs&);
  void (*sgd)(const Row&, Span, const SgdArgs&);
  void (*adamw)(const Row&, Span, const AdamArgs&, double step);  // step: 1 on the first
  // The squared norm of one group's G'A, or of one block of it. memory: a Workspace<double>, or <float>.
  double (*gram)(const Matrix& inputs, const Matrix& grads, Span rows, Span cols, bool with_bias, bool is_double, void* memory);
  double (*direct)(const Matrix& inputs, const Matrix& grads, const Product&, bool is_double, void* memory);
  void (*dots)(const Matrix& inputs, const Matrix& grads, Span groups, int64_t tokens, bool with_bias, double* square_norms, bool is_double,
               void* memory);
  void (*affine)(const AffineTask&, bool is_double);
  // The rows of each index added up and squared, for the indices that begin in the span.
  double (*row_squares)(const Operand& grads, int64_t dim, const Position* sorted, int64_t total, Span, const int64_t* padding_idx);
};

// The best table this processor can run, or the one named by SAM_KERNELS_ISA. Throws std::runtime_error when that one cannot run here.
const KernelTable& kernel_table();

}  // namespace sam::cpu
